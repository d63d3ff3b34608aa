"""The service on Kubernetes: kustomize's `base`, `components`, `overlays`, and what reads them before a cluster does.

`manifests` builds an overlay, `connections` adds up what it may open on databases, `simulation` runs its autoscaler.
"""
