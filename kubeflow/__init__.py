"""The Jobs of an overlay as a KubeFlow pipeline. Runs in .venv-kubeflow (`make kubeflow`): nothing else imports kfp."""
