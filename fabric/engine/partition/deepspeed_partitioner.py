"""Tensor parallelism by DeepSpeed's AutoTP, which finds columns and rows by itself.

Every rank reads whole matrices and gives up what is not its own, so a rank needs memory for its
stage's whole layers while it loads.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from fabric.engine.partition.groups import Groups
from fabric.engine.partition.partitioner import Parts
from fabric.errors import ModelNotLoadable, PackageMissing

_SHARED_MEMORY = "deepspeed_shm_comm"


class DeepSpeedPartitioner:
    """A ``Partitioner`` over ``deepspeed.init_inference``; sums go through the tensor group."""

    divides_logits = False

    def divide(self, model: PreTrainedModel, groups: Groups, *, name: str) -> Parts:
        """See ``Partitioner.divide``: refuses what AutoTP would divide wrongly."""
        config, tensor = model.config, groups.place.layout.tensor
        num_query = config.num_attention_heads
        num_key_value = getattr(config, "num_key_value_heads", None) or num_query
        if num_query % tensor or num_key_value % tensor:
            raise ModelNotLoadable(
                model=name,
                reason=f"DeepSpeed divides heads evenly, and its {num_query} query and"
                f" {num_key_value} key-value heads are not divisible by {tensor}; set partitioner"
                " to torch, or use pipeline_parallel",
            )
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            raise ModelNotLoadable(
                model=name,
                reason="DeepSpeed's AutoTP does not know transformers' experts; set partitioner to"
                " torch, or use pipeline_parallel",
            )
        return {}

    def complete(self, model: PreTrainedModel, groups: Groups) -> None:
        """See ``Partitioner.complete``."""
        try:
            import deepspeed
        except ImportError as error:
            raise PackageMissing(package="deepspeed", extra="deepspeed") from error
        # Its shared-memory sum on CPUs reads buffers that are only there if LOCAL_SIZE is set,
        # which torchrun does not do: a segmentation fault. It knows no groups either.
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
        deepspeed.init_inference(
            model,
            tensor_parallel={"tp_size": groups.place.layout.tensor, "tp_group": groups.tensor},
            dtype=model.dtype,
            replace_with_kernel_inject=False,
        )
