"""Time SGDM on many paths of a quadratic against other ways to do it, interleaved, and print path-steps per second.

python scripts/bench_dynamics.py     100,000 paths in 10 dimensions; torchsde is left out where it is not installed
pip install torchsde                 adds its Euler solver on the SME of the same problem
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from benchmark import Goal, report
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.oracle import NoisyGradientOracle
from hf_momentum.dynamics.problems import Quadratic

LR, MOMENTUM = 0.05, 0.9
FLOOR = "floor: the normals alone"


class Setting:
    """One quadratic, its noise and the start points.

    Args:
        paths: Number of paths.
        dim: Number of parameters.
        steps: Steps of a round.
        dtype: Of everything.
        full: Full matrices H and Σ instead of diagonal ones.
    """

    def __init__(self, paths: int, dim: int, steps: int, dtype: torch.dtype, full: bool) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.steps, self.device = steps, accelerator or torch.device("cpu")
        rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q if full else torch.eye(dim).double()
        curvature, variances = torch.linspace(0.1, 2.0, dim).double(), torch.linspace(1.0, 0.5, dim).double()
        self.hessian, self.root = (rotation * values @ rotation.T for values in (curvature, variances.sqrt()))
        covariance = self.root @ self.root
        problem = Quadratic(self.hessian if full else curvature).to(self.device, dtype)
        self.oracle = NoisyGradientOracle(problem, (covariance if full else variances).to(self.device, dtype))
        self.x0 = torch.ones(paths, dim, device=self.device, dtype=dtype)
        self.hessian, self.root = self.hessian.to(self.x0), self.root.to(self.x0)


def ours(setting: Setting, momentum: float) -> None:
    """Run this package's stream."""
    for _ in iterates(setting.oracle, setting.x0, LR, momentum, steps=setting.steps, every=setting.steps):
        pass


def normals(setting: Setting) -> None:
    """Draw as many normals as the run needs, into one buffer."""
    buffer = torch.empty_like(setting.x0)
    for _ in range(setting.steps):
        buffer.normal_()


def numpy_loop(setting: Setting) -> None:
    """Run the plain loop that one would write, with arrays over the paths."""
    x, hessian, root = (tensor.cpu().numpy() for tensor in (setting.x0.clone(), setting.hessian, setting.root))
    diagonal = setting.oracle.problem.curvature.ndim == 1
    m, random = np.zeros_like(x), np.random.default_rng(0)
    for _ in range(setting.steps):
        noise = random.standard_normal(x.shape, dtype=x.dtype)
        gradient = x * hessian.diagonal() + noise * root.diagonal() if diagonal else x @ hessian + noise @ root
        m = MOMENTUM * m + (1 - MOMENTUM) * gradient
        x = x - LR * m


class Sme(torch.nn.Module):
    """The SME in torchsde's form, over t = kη."""

    sde_type = "ito"

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.diagonal = setting.oracle.problem.curvature.ndim == 1
        self.noise_type = "diagonal" if self.diagonal else "additive"
        self.problem = setting.oracle.problem
        root = LR**0.5 * (setting.root.diagonal() if self.diagonal else setting.root)
        self.root = root.expand(len(setting.x0), *root.shape)

    def f(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Drift."""
        return -self.problem.gradient(x)

    def g(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Diffusion."""
        return self.root


def torchsde_euler(setting: Setting) -> None:
    """Integrate the SME with torchsde's Euler scheme, one step of η for each step of SGDM."""
    import torchsde

    times = torch.tensor([0.0, LR * setting.steps], device=setting.device, dtype=setting.x0.dtype)
    with torch.no_grad():
        torchsde.sdeint(Sme(setting), setting.x0, times, method="euler", dt=LR)


def seconds(run: Callable[[Setting], None], setting: Setting) -> float:
    """Time one run, with the accelerator's work done."""
    synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    run(setting)
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time all cases round by round, so that all meet the same disturbances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--full", action="store_true", help="full matrices instead of diagonal ones")
    args = parser.parse_args()
    setting = Setting(args.paths, args.dim, args.steps, getattr(torch, args.dtype), args.full)
    cases = {
        FLOOR: normals,
        "SGDM: ours": lambda setting: ours(setting, MOMENTUM),
        "SGD: ours": lambda setting: ours(setting, 0.0),
        "SGDM: plain numpy loop": numpy_loop,
    }
    if importlib.util.find_spec("torchsde"):
        cases["SME: torchsde, Euler"] = torchsde_euler
    times = {name: [] for name in cases}
    for _ in track(range(args.rounds + 1), "rounds"):
        for name, run in cases.items():
            times[name].append(seconds(run, setting))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    kind = "full" if args.full else "diagonal"
    table = Table(
        title=f"{args.paths:,} paths, {args.dim} dimensions, {kind}, {args.dtype} on {setting.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for column in ("case", "million path-steps/s", "× floor's time", "ours is faster ×"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, median in medians.items():
        rate, floor = args.paths * args.steps / median / 1e6, median / medians[FLOOR]
        table.add_row(name, f"{rate:.3g}", f"{floor:.2f}", f"{median / medians['SGDM: ours']:.2f}")
    Console().print(table)
    goals = [Goal("SGDM on many paths / drawing its normals", medians["SGDM: ours"] / medians[FLOOR], 2)]
    if "SME: torchsde, Euler" in medians:
        ratio = medians["SME: torchsde, Euler"] / medians["SGDM: ours"]
        goals.append(Goal("torchsde's Euler on many paths / SGDM, ours", ratio, 5, at_least=True))
    report(goals)


if __name__ == "__main__":
    main()
