"""What happens after the answer: the relay, the Celery workers with their tasks, and the scheduler."""
