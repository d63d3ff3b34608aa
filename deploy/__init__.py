"""Everything that puts the service somewhere: the local cluster, NGINX, Kubernetes, Terraform, dashboards.

Nothing below `app`, `workers` or `migrations` imports from here at run time; a deployed image leaves it out.
"""
