"""The executor `kubernetes-volume`: snakemake-executor-plugin-kubernetes, with a volume that all jobs share.

The plugin mounts persistent volumes, but declares that its jobs share no file system. Snakemake then moves every input
and output by a storage provider, and what stands beside an output, as the shards of a release do, is lost with its pod.
Here the plugin declares what a shared volume is: one file system, under one path. All else is the plugin's.
"""

import dataclasses
import shlex

from snakemake_executor_plugin_kubernetes import Executor as KubernetesExecutor
from snakemake_executor_plugin_kubernetes import ExecutorSettings as KubernetesSettings
from snakemake_executor_plugin_kubernetes import common_settings as kubernetes_settings

common_settings = dataclasses.replace(
    kubernetes_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
)


@dataclasses.dataclass
class ExecutorSettings(KubernetesSettings):
    """The plugin's settings, as options --kubernetes-volume-..."""


class Executor(KubernetesExecutor):
    """The plugin's executor. Its pods start in a folder of their own, so a job first goes to that of the build."""

    def get_job_exec_prefix(self, job):
        """What a job's command begins with."""
        return f"cd {shlex.quote(str(self.workflow.workdir_init))}"
