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
from labpkg.planning.memory import peak_memory, usable_bytes
from labpkg.planning.scaling import model_flops_utilization, palm_flops_per_token
from labpkg.planning.step_time import step_time
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
    def usable_bytes(self) -> float:
        """Bytes of a GPU that the tensors of a job can fill."""
        return usable_bytes(self.hardware)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank stays within the usable bytes."""
        return self.memory_bytes <= self.usable_bytes

    @property
    def mfu(self) -> float:
        """Model FLOPs per second, as a share of the dense peak of the precision.

        The model's FLOPs are 6 N + 12 L D T for each token, whatever is recomputed; N
        counts tied weights once.
        """
        model = self.configuration.model
        return model_flops_utilization(
            self.tokens_per_s_per_gpu,
            flops_per_token=palm_flops_per_token(
                model.num_parameters,
                num_layers=model.num_layers,
                width=model.width,
                sequence_length=model.sequence_length,
            ),
            peak_flops=self.hardware.peak_flops[self.configuration.precision],
        )


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
        time_terms=step_time(configuration, hardware).terms,
        memory_terms=peak_memory(configuration).terms,
    )
