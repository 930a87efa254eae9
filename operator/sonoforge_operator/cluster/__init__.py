"""The port to a Kubernetes cluster: children are objects, the status is the status of the PretrainJob."""
