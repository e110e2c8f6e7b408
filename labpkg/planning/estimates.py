"""What one training job takes: seconds, bytes, and whether it fits.

An `Estimate` joins the two predictions, time and memory, with the numbers that people
compare: tokens per second and GPU, and the share of the peak that the model's own
FLOPs use (MFU). Both predictions stay readable as sums of terms.

Standard library only. Chapter: planning/planner. Reference: Chowdhery et al. 2022,
PaLM, arXiv:2204.02311, appendix B (MFU).
"""

from __future__ import annotations

from dataclasses import dataclass

from labpkg.planning.configuration import Configuration
from labpkg.planning.hardware import Hardware
from labpkg.planning.shapes import ModelShape
from labpkg.planning.terms import Term, total


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Say what a job takes on a machine.

    Args:
        configuration: The job.
        hardware: The machine.
        time_terms: Seconds of a step, term by term.
        memory_terms: Peak bytes of the fullest rank, term by term.
    """

    configuration: Configuration
    hardware: Hardware
    time_terms: tuple[Term, ...]
    memory_terms: tuple[Term, ...]

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return total(self.time_terms)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens that one GPU contributes in a second."""
        job = self.configuration
        return job.tokens_per_step / self.step_s / job.world_size

    @property
    def memory_bytes(self) -> float:
        """Peak of allocated bytes, of the rank that needs most."""
        return total(self.memory_terms)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank stays below what a GPU has to offer."""
        return self.memory_bytes <= self.hardware.memory_bytes

    @property
    def mfu(self) -> float:
        """Model FLOPs per second, as a share of the dense peak of the precision.

        The model's FLOPs are 6 N + 12 L D T for each token, whatever is recomputed; N
        counts tied weights once.
        """
        peak = self.hardware.peak_flops[self.configuration.precision]
        return self.tokens_per_s_per_gpu * _flops(self.configuration.model) / peak


def _flops(model: ModelShape) -> int:
    attention = 12 * model.num_layers * model.width * model.sequence_length
    return 6 * model.num_parameters + attention


def estimate(configuration: Configuration, hardware: Hardware) -> Estimate:
    """Predict the step time and the peak memory of a job.

    Args:
        configuration: The job.
        hardware: The machine; it must know the precision.

    Returns:
        The estimate, also for a job that does not fit.
    """
    return Estimate(
        configuration=configuration,
        hardware=hardware,
        time_terms=_time_terms(configuration, hardware),
        memory_terms=_memory_terms(configuration),
    )


def _time_terms(job: Configuration, hardware: Hardware) -> tuple[Term, ...]:
    model = job.model
    rate = 0.7 * hardware.peak_flops[job.precision] * hardware.matmul_fraction
    passes = 4 / 3 if job.recompute == "full" else 1
    compute = (
        passes * model.flops_per_token * job.tokens_per_step / job.world_size / rate
    )
    bubble = (job.pp - 1) / (job.num_virtual_stages * job.grad_accum_steps)
    tokens = job.micro_batch_size * model.sequence_length / job.cp
    link = hardware.network_bytes_per_s[max(hardware.network_bytes_per_s)]
    inside = hardware.node_bytes_per_s if job.tp <= job.gpus_per_node else link
    per_layer = 8 * 2 * tokens * model.width * (job.tp - 1) / job.tp / inside
    layers = job.grad_accum_steps * model.num_layers / job.pp * per_layer
    n = job.dp * job.cp
    held = model.num_parameters / job.tp / job.pp
    reduced = 2 * 4 * held * (n - 1) / n / (inside if job.nodes == 1 else link)
    return (
        Term("compute", compute, "FLOPs / (world size x rate)", "stand-in"),
        Term("pipeline bubble", compute * bubble, "(P - 1) / (v M)", "stand-in"),
        Term("tensor parallel", layers, "8 B T D per layer", "stand-in"),
        Term("data parallel", reduced, "2 (n - 1) / n S", "stand-in"),
    )


def _memory_terms(job: Configuration) -> tuple[Term, ...]:
    model, n = job.model, job.dp * job.cp
    held = model.num_parameters / job.tp / job.pp
    tokens = job.micro_batch_size * model.sequence_length / job.cp
    width, layers = model.width, model.num_layers / job.pp
    per_token = 2 * width if job.recompute == "full" else 34 * width / job.tp
    in_flight = min(job.pp, job.grad_accum_steps)
    return (
        Term("weights", 2 * held / (n if job.zero > 2 else 1), "2 N", "stand-in"),
        Term("gradients", 6 * held / (n if job.zero > 1 else 1), "6 N", "stand-in"),
        Term("optimizer", 12 * held / (n if job.zero else 1), "12 N", "stand-in"),
        Term("activations", tokens * per_token * layers * in_flight, "", "stand-in"),
        Term("logits", 6 * tokens * model.vocab_size / job.tp, "6 B T V", "stand-in"),
    )
