"""Checkers for the exercises of the book: `lab.check.<name>(your_function)`.

A checker runs the function on cases, prints `ok 12 cases` or the first failing case
with a hint, and returns a `CheckResult` that is false on failure. It never raises for a
wrong answer.
"""

from labpkg.check.all_reduce_exercises import halving_doubling, ring_all_reduce
from labpkg.check.attention_exercises import (
    attention,
    attention_gradient,
    merge_attention,
)
from labpkg.check.beyond_one_machine_exercises import (
    bytes_leaving,
    expand_hosts,
    next_world,
    node_of,
    repeated_steps,
)
from labpkg.check.checkpointing_exercises import (
    checkpoint_interval,
    lost_way,
    overlap,
    range_boxes,
    steps_to_remove,
)
from labpkg.check.collectives_exercises import (
    broadcast_gradient,
    exchange,
    first_mismatch,
    sent_bytes,
)
from labpkg.check.communication_cost_exercises import (
    doubling_rounds,
    fit_alpha_beta,
    num_pieces,
    ring_pays_from,
    ring_time,
)
from labpkg.check.cross_entropy_exercises import (
    cross_entropy,
    cross_entropy_gradient,
    label_smoothing,
    softmax,
    weighted_mean,
)
from labpkg.check.data_loading_exercises import (
    batch_time,
    padded_indices,
    position_noise,
    rank_batch,
    step_starts,
)
from labpkg.check.data_parallel_exercises import (
    accumulated_gradient,
    bucket_sizes,
    end_of_step,
)
from labpkg.check.data_parallel_replicas_exercises import (
    first_drift,
    local_sgd,
    mean_of_used,
)
from labpkg.check.device_mesh_exercises import (
    axis_groups,
    coordinates,
    mesh_grad_norm,
    network_bytes,
    possible_meshes,
)
from labpkg.check.faults_exercises import (
    agree_to_skip,
    find_stragglers,
    goodput,
    spikes,
    stopped_rank,
)
from labpkg.check.gradient_descent_adamw_exercises import adamw_step
from labpkg.check.gradient_descent_curvature_exercises import (
    sharpness,
    stability_limit,
)
from labpkg.check.gradient_descent_step_exercises import (
    clip_by_norm,
    linear_schedule,
    momentum_step,
)
from labpkg.check.measuring_exercises import (
    mean_in_flight,
    mfu_once,
    quiet_ratio,
    rotation,
    serial_fraction,
)
from labpkg.check.messages_exercises import finish_times
from labpkg.check.pipeline_exercises import (
    best_cut,
    fewest_micro_batches,
    one_f_one_b_order,
    peak_in_flight,
)
from labpkg.check.pipeline_step_exercises import micro_batch_gradients, step_time
from labpkg.check.planner_exercises import (
    first_fit,
    most_replicas,
    pareto_front,
    plan_regret,
    rank_correlation,
)
from labpkg.check.planning_memory_exercises import (
    best_interval,
    largest_micro_batch,
    logit_pieces,
    peak_of_lifetimes,
    stage_bytes,
)
from labpkg.check.ranks_exercises import (
    first_failure,
    global_rank,
    hang_suspect,
    ring_neighbours,
    shard_bounds,
)
from labpkg.check.ranks_processes_exercises import supervise
from labpkg.check.result import CheckResult
from labpkg.check.setup_exercises import (
    new_enough,
    rank_variables,
    ranks_per_gpu,
    threads_per_rank,
    visible_gpus,
)
from labpkg.check.tensor_parallel_exercises import (
    cheapest_cuts,
    compute_bound_width,
    feed_forward,
    qkv_rows,
)
from labpkg.check.tensor_parallel_gradient_exercises import (
    sequence_gradients,
    vocabulary_loss,
)
from labpkg.check.training_loop_data_exercises import (
    binary_scores,
    merged_statistics,
    standardize,
)
from labpkg.check.training_loop_run_exercises import (
    early_stopping,
    stage_speedup,
    whole_run,
)
from labpkg.check.transformer_exercises import (
    causal_mask,
    gpt_parameters,
    multi_head,
)
from labpkg.check.vocabulary_exercises import chunked_cross_entropy
from labpkg.check.zero_exercises import fewest_ranks, owned_ranges, zero_memory
from labpkg.check.zero_step_exercises import clip_slices, reshard, sharded_momentum

__all__ = [
    "CheckResult",
    "accumulated_gradient",
    "adamw_step",
    "agree_to_skip",
    "attention",
    "attention_gradient",
    "axis_groups",
    "batch_time",
    "best_cut",
    "best_interval",
    "binary_scores",
    "broadcast_gradient",
    "bucket_sizes",
    "bytes_leaving",
    "causal_mask",
    "cheapest_cuts",
    "checkpoint_interval",
    "chunked_cross_entropy",
    "clip_by_norm",
    "clip_slices",
    "compute_bound_width",
    "coordinates",
    "cross_entropy",
    "cross_entropy_gradient",
    "doubling_rounds",
    "early_stopping",
    "end_of_step",
    "exchange",
    "expand_hosts",
    "feed_forward",
    "fewest_micro_batches",
    "fewest_ranks",
    "find_stragglers",
    "finish_times",
    "first_drift",
    "first_failure",
    "first_fit",
    "first_mismatch",
    "fit_alpha_beta",
    "global_rank",
    "goodput",
    "gpt_parameters",
    "halving_doubling",
    "hang_suspect",
    "label_smoothing",
    "largest_micro_batch",
    "linear_schedule",
    "local_sgd",
    "logit_pieces",
    "lost_way",
    "mean_in_flight",
    "mean_of_used",
    "merge_attention",
    "merged_statistics",
    "mesh_grad_norm",
    "mfu_once",
    "micro_batch_gradients",
    "momentum_step",
    "most_replicas",
    "multi_head",
    "network_bytes",
    "new_enough",
    "next_world",
    "node_of",
    "num_pieces",
    "one_f_one_b_order",
    "overlap",
    "owned_ranges",
    "padded_indices",
    "pareto_front",
    "peak_in_flight",
    "peak_of_lifetimes",
    "plan_regret",
    "position_noise",
    "possible_meshes",
    "qkv_rows",
    "quiet_ratio",
    "range_boxes",
    "rank_batch",
    "rank_correlation",
    "rank_variables",
    "ranks_per_gpu",
    "repeated_steps",
    "reshard",
    "ring_all_reduce",
    "ring_neighbours",
    "ring_pays_from",
    "ring_time",
    "rotation",
    "sent_bytes",
    "sequence_gradients",
    "serial_fraction",
    "shard_bounds",
    "sharded_momentum",
    "sharpness",
    "softmax",
    "spikes",
    "stability_limit",
    "stage_bytes",
    "stage_speedup",
    "standardize",
    "step_starts",
    "step_time",
    "steps_to_remove",
    "stopped_rank",
    "supervise",
    "threads_per_rank",
    "visible_gpus",
    "vocabulary_loss",
    "weighted_mean",
    "whole_run",
    "zero_memory",
]
