"""What the paper proves, as running code: noisy gradient oracles, SGD and SGDM on them, and the SDEs of their limits.

Conventions of the whole room:

- **Paths.** Positions `x` and momenta `m` are tensors `(paths, dim)`, on any device, float64 unless the caller's own
  tensors say otherwise. Losses map `(paths, dim)` to `(paths,)`, gradients to `(paths, dim)`, Hessians and
  covariances to `(paths, dim, dim)`.
- **Noise.** An oracle returns `g = ∇L(x) + σ v` with `E v = 0` and `Cov v = Σ(x)`. σ is `scale`, Σ is `covariance`,
  and Σ does not depend on σ. Mini-batches of B with replacement are `σ² = 1/B`, Σ the per-example gradient covariance.
- **Randomness.** `oracle.draw(x, generator)` gives the random numbers of one step, which do not depend on where the
  paths are; `oracle(x, draw)` gives the gradients. Runs that share draws share their noise: two runs whose
  `torch.Generator`s (of x's device) were seeded alike are coupled path by path, be they SGD, SGDM or an SDE.
- **Time.** Step k has the learning rate η_k (`lr`, effective, Eq. 3) and the momentum β_k; the first one is k = 0. A
  schedule is a number, a sequence or a function of k. `x_k` is the position after k steps; SDEs are read at the
  same k.
- **Streams.** Simulations and recursions are generators that hold one state, so memory does not grow with the steps.
  Tensors they yield are live: reduce them before the next step, or clone them.
- **Exact moments** are NumPy float64 arrays on the CPU.

Equations are those of Wang et al., "The Marginal Value of Momentum for Small Learning Rate SGD" (ICLR 2024, arXiv
2307.15196), and of Li, Malladi, Arora (NeurIPS 2021, arXiv 2102.12470) for SVAG.
"""
