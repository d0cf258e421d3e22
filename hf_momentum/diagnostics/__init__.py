"""What is measured on a real model: gradient noise, curvature, and what they say about momentum.

Conventions of the whole room:

- L is the mean loss over examples, `g_b` and `H_b` are the gradient and the Hessian of a micro-batch's loss, b is the
  number of examples in it. Σ is the covariance of *one example's* gradient: a batch of B has noise `Σ/B`.
- Every estimate is unbiased where its formula is linear in unbiased parts, and comes with a 95% interval. Products of
  a batch's gradient with *its own* Hessian, or with itself, are biased and never stand for those of the full loss.
- Under `torch.distributed` every rank calls the `measure_*` functions with its own batches, and all get the same
  answer.
"""
