"""Parallel training from one process to many: short engines that are proven exact.

Names resolve on first use (PEP 562), so `import labpkg as lab` costs milliseconds,
imports no torch, starts no process group and touches no GPU. What is listed here is
the public API; everything else may change between versions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "ModelShape": "planning.shapes",
    "data_parallel_bytes": "planning.cost",
    "wire_bytes": "planning.cost",
    "activation_bytes": "planning.cost",
    "model_state_bytes": "planning.cost",
    "zero_bytes": "planning.cost",
    "AlphaBeta": "planning.communication",
    "Level": "planning.communication",
    "all_reduce_time": "planning.communication",
    "all_reduce_wire_bytes": "planning.communication",
    "crossover_bytes": "planning.communication",
    "hierarchical_all_reduce_time": "planning.communication",
    "level_between": "planning.communication",
    "Action": "planning.actions",
    "Schedule": "planning.actions",
    "Message": "planning.actions",
    "gpipe": "planning.schedules",
    "one_f_one_b": "planning.schedules",
    "interleaved": "planning.schedules",
    "zero_bubble": "planning.schedules",
    "StageCost": "planning.simulator",
    "Timeline": "planning.simulator",
    "simulate": "planning.simulator",
    "Span": "planning.simulator",
    "tensor_parallel_bytes": "planning.model_parallel",
    "pipeline_bytes": "planning.model_parallel",
    "gpt_layer_cuts": "planning.model_parallel",
    "Layout": "planning.layout",
    "Configuration": "planning.configuration",
    "Term": "planning.terms",
    "Hardware": "planning.hardware",
    "HARDWARE": "planning.hardware",
    "find_hardware": "planning.hardware",
    "hardware_json": "planning.hardware",
    "MODEL_SHAPES": "planning.models",
    "find_model": "planning.models",
    "Estimate": "planning.estimates",
    "estimate": "planning.estimates",
    "Plan": "planning.plans",
    "format_plans": "planning.plans",
    "plan": "planning.planner",
    "peak_memory": "planning.memory",
    "PeakMemory": "planning.memory",
    "usable_bytes": "planning.memory",
    "DividedWork": "planning.scaling",
    "parallel_efficiency": "planning.scaling",
    "palm_flops_per_token": "planning.scaling",
    "model_flops_utilization": "planning.scaling",
    "littles_law": "planning.scaling",
    "Table": "planning.tables",
    "read_table": "planning.tables",
    "write_table": "planning.tables",
    "predict_table": "planning.predictions",
    "score_tables": "planning.scoring",
    "Score": "planning.scoring",
    "cross_entropy": "foundations.losses",
    "SGD": "foundations.optimizers",
    "AdamW": "foundations.optimizers",
    "warmup_constant": "foundations.learning_rates",
    "inverse_sqrt": "foundations.learning_rates",
    "warmup_cosine": "foundations.learning_rates",
    "warmup_linear": "foundations.learning_rates",
    "MLP": "foundations.models",
    "GPT": "foundations.models",
    "GPTConfig": "foundations.models",
    "KVCache": "foundations.models",
    "digits": "foundations.tables",
    "breast_cancer": "foundations.tables",
    "mnist_5k": "foundations.tables",
    "spirals": "foundations.tables",
    "regression": "foundations.tables",
    "stdlib_text": "foundations.text",
    "file_text": "foundations.text",
    "batches": "foundations.data",
    "Standardize": "foundations.transforms",
    "augment": "foundations.transforms",
    "ConfusionMatrix": "foundations.metrics",
    "RunningMean": "foundations.metrics",
    "live_tensor_bytes": "foundations.memory",
    "World": "processes.world",
    "RankError": "processes.world",
    "make_mesh": "processes.mesh",
    "all_reduce": "processes.collectives",
    "reduce": "processes.collectives",
    "broadcast": "processes.collectives",
    "all_gather": "processes.collectives",
    "reduce_scatter": "processes.collectives",
    "all_to_all": "processes.collectives",
    "send": "processes.messages",
    "recv": "processes.messages",
    "sendrecv": "processes.messages",
    "barrier": "processes.messages",
    "ring_all_reduce": "processes.algorithms",
    "tree_all_reduce": "processes.algorithms",
    "recursive_doubling_all_reduce": "processes.algorithms",
    "all_gather_object": "processes.messages",
    "count_comms": "processes.traffic",
    "check_replicas": "processes.replicas",
    "average_parameters": "processes.replicas",
    "ColumnParallelLinear": "processes.parallel_layers",
    "RowParallelLinear": "processes.parallel_layers",
    "VocabParallelEmbedding": "processes.parallel_layers",
    "split_stages": "processes.stages",
    "materialize": "processes.initial_values",
    "DataParallel": "parallelism.data_parallel",
    "average_gradients": "parallelism.data_parallel",
    "average_gradients_bucketed": "parallelism.data_parallel",
    "mean_weight": "parallelism.data_parallel",
    "clip_grad_norm": "parallelism.clipping",
    "ZeroOptimizer": "parallelism.zero",
    "fully_shard": "parallelism.fsdp",
    "full_gradients": "parallelism.whole",
    "full_state_dict": "parallelism.whole",
    "load_full_state_dict": "parallelism.whole",
    "param_groups": "parallelism.whole",
    "consolidate": "parallelism.whole",
    "apply_tensor_parallel": "parallelism.tensor_parallel",
    "gpt_tensor_parallel_plan": "parallelism.tensor_parallel",
    "vocab_parallel_cross_entropy": "parallelism.vocabulary_loss",
    "Pipeline": "parallelism.pipeline",
    "Trainer": "runs.trainer",
    "TrainConfig": "runs.config",
    "TrainResult": "runs.trainer",
    "save_checkpoint": "runs.checkpoint",
    "load_checkpoint": "runs.checkpoint",
    "export_state_dict": "runs.checkpoint",
    "newest_checkpoint": "runs.checkpoint",
    "verify_checkpoint": "runs.checkpoint",
    "compose": "runs.composing",
    "Composition": "runs.composition",
    "StepReport": "runs.composition",
    "LossScale": "runs.loss_scale",
    "Callback": "runs.callbacks",
    "Preemption": "runs.faults",
    "SkippedSteps": "runs.faults",
    "LossSpike": "runs.faults",
    "ReplicaCheck": "runs.faults",
    "Stragglers": "runs.stragglers",
    "Straggler": "runs.stragglers",
    "Heartbeat": "runs.heartbeat",
    "Manifest": "runs.checkpoint_files",
    "PendingSave": "runs.checkpoint_save",
    "show": "display",
}
_MODULES = ("bench", "check", "plot")

__all__ = ["__version__", *sorted(_EXPORTS), *_MODULES]  # pyright: ignore

if TYPE_CHECKING:
    from labpkg import bench as bench
    from labpkg import check as check
    from labpkg import plot as plot
    from labpkg.display import show as show
    from labpkg.foundations.data import batches as batches
    from labpkg.foundations.learning_rates import inverse_sqrt as inverse_sqrt
    from labpkg.foundations.learning_rates import warmup_constant as warmup_constant
    from labpkg.foundations.learning_rates import warmup_cosine as warmup_cosine
    from labpkg.foundations.learning_rates import warmup_linear as warmup_linear
    from labpkg.foundations.losses import cross_entropy as cross_entropy
    from labpkg.foundations.memory import live_tensor_bytes as live_tensor_bytes
    from labpkg.foundations.metrics import ConfusionMatrix as ConfusionMatrix
    from labpkg.foundations.metrics import RunningMean as RunningMean
    from labpkg.foundations.models import GPT as GPT
    from labpkg.foundations.models import MLP as MLP
    from labpkg.foundations.models import GPTConfig as GPTConfig
    from labpkg.foundations.models import KVCache as KVCache
    from labpkg.foundations.optimizers import SGD as SGD
    from labpkg.foundations.optimizers import AdamW as AdamW
    from labpkg.foundations.tables import breast_cancer as breast_cancer
    from labpkg.foundations.tables import digits as digits
    from labpkg.foundations.tables import mnist_5k as mnist_5k
    from labpkg.foundations.tables import regression as regression
    from labpkg.foundations.tables import spirals as spirals
    from labpkg.foundations.text import file_text as file_text
    from labpkg.foundations.text import stdlib_text as stdlib_text
    from labpkg.foundations.transforms import Standardize as Standardize
    from labpkg.foundations.transforms import augment as augment
    from labpkg.parallelism.clipping import clip_grad_norm as clip_grad_norm
    from labpkg.parallelism.data_parallel import DataParallel as DataParallel
    from labpkg.parallelism.data_parallel import average_gradients as average_gradients
    from labpkg.parallelism.data_parallel import (
        average_gradients_bucketed as average_gradients_bucketed,
    )
    from labpkg.parallelism.data_parallel import mean_weight as mean_weight
    from labpkg.parallelism.fsdp import fully_shard as fully_shard
    from labpkg.parallelism.pipeline import Pipeline as Pipeline
    from labpkg.parallelism.tensor_parallel import (
        apply_tensor_parallel as apply_tensor_parallel,
    )
    from labpkg.parallelism.tensor_parallel import (
        gpt_tensor_parallel_plan as gpt_tensor_parallel_plan,
    )
    from labpkg.parallelism.vocabulary_loss import (
        vocab_parallel_cross_entropy as vocab_parallel_cross_entropy,
    )
    from labpkg.parallelism.whole import consolidate as consolidate
    from labpkg.parallelism.whole import full_gradients as full_gradients
    from labpkg.parallelism.whole import full_state_dict as full_state_dict
    from labpkg.parallelism.whole import load_full_state_dict as load_full_state_dict
    from labpkg.parallelism.whole import param_groups as param_groups
    from labpkg.parallelism.zero import ZeroOptimizer as ZeroOptimizer
    from labpkg.planning.actions import Action as Action
    from labpkg.planning.actions import Message as Message
    from labpkg.planning.actions import Schedule as Schedule
    from labpkg.planning.communication import AlphaBeta as AlphaBeta
    from labpkg.planning.communication import Level as Level
    from labpkg.planning.communication import all_reduce_time as all_reduce_time
    from labpkg.planning.communication import (
        all_reduce_wire_bytes as all_reduce_wire_bytes,
    )
    from labpkg.planning.communication import crossover_bytes as crossover_bytes
    from labpkg.planning.communication import (
        hierarchical_all_reduce_time as hierarchical_all_reduce_time,
    )
    from labpkg.planning.communication import level_between as level_between
    from labpkg.planning.configuration import Configuration as Configuration
    from labpkg.planning.cost import activation_bytes as activation_bytes
    from labpkg.planning.cost import data_parallel_bytes as data_parallel_bytes
    from labpkg.planning.cost import model_state_bytes as model_state_bytes
    from labpkg.planning.cost import wire_bytes as wire_bytes
    from labpkg.planning.cost import zero_bytes as zero_bytes
    from labpkg.planning.estimates import Estimate as Estimate
    from labpkg.planning.estimates import estimate as estimate
    from labpkg.planning.hardware import HARDWARE as HARDWARE
    from labpkg.planning.hardware import Hardware as Hardware
    from labpkg.planning.hardware import find_hardware as find_hardware
    from labpkg.planning.hardware import hardware_json as hardware_json
    from labpkg.planning.layout import Layout as Layout
    from labpkg.planning.memory import PeakMemory as PeakMemory
    from labpkg.planning.memory import peak_memory as peak_memory
    from labpkg.planning.memory import usable_bytes as usable_bytes
    from labpkg.planning.model_parallel import gpt_layer_cuts as gpt_layer_cuts
    from labpkg.planning.model_parallel import pipeline_bytes as pipeline_bytes
    from labpkg.planning.model_parallel import (
        tensor_parallel_bytes as tensor_parallel_bytes,
    )
    from labpkg.planning.models import MODEL_SHAPES as MODEL_SHAPES
    from labpkg.planning.models import find_model as find_model
    from labpkg.planning.planner import plan as plan
    from labpkg.planning.plans import Plan as Plan
    from labpkg.planning.plans import format_plans as format_plans
    from labpkg.planning.predictions import predict_table as predict_table
    from labpkg.planning.scaling import DividedWork as DividedWork
    from labpkg.planning.scaling import littles_law as littles_law
    from labpkg.planning.scaling import (
        model_flops_utilization as model_flops_utilization,
    )
    from labpkg.planning.scaling import palm_flops_per_token as palm_flops_per_token
    from labpkg.planning.scaling import parallel_efficiency as parallel_efficiency
    from labpkg.planning.schedules import gpipe as gpipe
    from labpkg.planning.schedules import interleaved as interleaved
    from labpkg.planning.schedules import one_f_one_b as one_f_one_b
    from labpkg.planning.schedules import zero_bubble as zero_bubble
    from labpkg.planning.scoring import Score as Score
    from labpkg.planning.scoring import score_tables as score_tables
    from labpkg.planning.shapes import ModelShape as ModelShape
    from labpkg.planning.simulator import Span as Span
    from labpkg.planning.simulator import StageCost as StageCost
    from labpkg.planning.simulator import Timeline as Timeline
    from labpkg.planning.simulator import simulate as simulate
    from labpkg.planning.tables import Table as Table
    from labpkg.planning.tables import read_table as read_table
    from labpkg.planning.tables import write_table as write_table
    from labpkg.planning.terms import Term as Term
    from labpkg.processes.algorithms import (
        recursive_doubling_all_reduce as recursive_doubling_all_reduce,
    )
    from labpkg.processes.algorithms import ring_all_reduce as ring_all_reduce
    from labpkg.processes.algorithms import tree_all_reduce as tree_all_reduce
    from labpkg.processes.collectives import all_gather as all_gather
    from labpkg.processes.collectives import all_reduce as all_reduce
    from labpkg.processes.collectives import all_to_all as all_to_all
    from labpkg.processes.collectives import broadcast as broadcast
    from labpkg.processes.collectives import reduce as reduce
    from labpkg.processes.collectives import reduce_scatter as reduce_scatter
    from labpkg.processes.initial_values import materialize as materialize
    from labpkg.processes.mesh import make_mesh as make_mesh
    from labpkg.processes.messages import all_gather_object as all_gather_object
    from labpkg.processes.messages import barrier as barrier
    from labpkg.processes.messages import recv as recv
    from labpkg.processes.messages import send as send
    from labpkg.processes.messages import sendrecv as sendrecv
    from labpkg.processes.parallel_layers import (
        ColumnParallelLinear as ColumnParallelLinear,
    )
    from labpkg.processes.parallel_layers import RowParallelLinear as RowParallelLinear
    from labpkg.processes.parallel_layers import (
        VocabParallelEmbedding as VocabParallelEmbedding,
    )
    from labpkg.processes.replicas import average_parameters as average_parameters
    from labpkg.processes.replicas import check_replicas as check_replicas
    from labpkg.processes.stages import split_stages as split_stages
    from labpkg.processes.traffic import count_comms as count_comms
    from labpkg.processes.world import RankError as RankError
    from labpkg.processes.world import World as World
    from labpkg.runs.callbacks import Callback as Callback
    from labpkg.runs.checkpoint import export_state_dict as export_state_dict
    from labpkg.runs.checkpoint import load_checkpoint as load_checkpoint
    from labpkg.runs.checkpoint import newest_checkpoint as newest_checkpoint
    from labpkg.runs.checkpoint import save_checkpoint as save_checkpoint
    from labpkg.runs.checkpoint import verify_checkpoint as verify_checkpoint
    from labpkg.runs.checkpoint_files import Manifest as Manifest
    from labpkg.runs.checkpoint_save import PendingSave as PendingSave
    from labpkg.runs.composing import compose as compose
    from labpkg.runs.composition import Composition as Composition
    from labpkg.runs.composition import StepReport as StepReport
    from labpkg.runs.config import TrainConfig as TrainConfig
    from labpkg.runs.faults import LossSpike as LossSpike
    from labpkg.runs.faults import Preemption as Preemption
    from labpkg.runs.faults import ReplicaCheck as ReplicaCheck
    from labpkg.runs.faults import SkippedSteps as SkippedSteps
    from labpkg.runs.heartbeat import Heartbeat as Heartbeat
    from labpkg.runs.loss_scale import LossScale as LossScale
    from labpkg.runs.stragglers import Straggler as Straggler
    from labpkg.runs.stragglers import Stragglers as Stragglers
    from labpkg.runs.trainer import Trainer as Trainer
    from labpkg.runs.trainer import TrainResult as TrainResult


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = importlib.import_module(f"labpkg.{_EXPORTS[name]}")
        value = globals()[name] = getattr(module, name)
        return value
    if name in _MODULES:
        return importlib.import_module(f"labpkg.{name}")
    raise AttributeError(f"module 'labpkg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
