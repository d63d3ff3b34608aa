"""The horizontal pod autoscaler on paper: the manifests' own numbers against a load, before a customer tries them.

`autoscaler` is Kubernetes' published algorithm, `service` the pods and what they do to requests, `__main__` the run
that draws docs/deployment/autoscaling.svg. Nothing here talks to a cluster.
"""
