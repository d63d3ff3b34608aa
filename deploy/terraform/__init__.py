"""One region on AWS without Kubernetes: Terraform modules, and `costs`, which estimates the bill at several sizes."""
