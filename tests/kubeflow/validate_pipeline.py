"""Validates IR YAML in .venv-kubeflow: reads it, and raises what kfp has against it."""

from __future__ import annotations

import sys

import yaml
from google.protobuf import json_format
from kfp import components
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

if __name__ == "__main__":
    text = sys.stdin.read()
    components.load_component_from_text(text)
    spec, platform = yaml.safe_load_all(text)
    pipeline = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())  # refuses unknown fields and wrong types
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    of_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for config in of_kubernetes.values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    executors = spec["deploymentSpec"]["executors"]
    assert of_kubernetes.keys() <= executors.keys()
    labels = {component.executor_label for component in pipeline.components.values() if component.executor_label}
    assert labels == executors.keys()
