//! Where a backward pass begins that is not that of a loss: at a tensor whose gradient is known.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, backprop::GradStore};

/// The gradients of everything that `output` was made of, given that of `output` itself, which has its
/// shape.
///
/// # Errors
/// A failed tensor operation.
pub fn backward_from(output: &Tensor, gradient: Tensor) -> Result<GradStore> {
    output.apply_op1(Seed { gradient })?.backward()
}

/// A scalar that has a given gradient.
struct Seed {
    gradient: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _output: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _output: &Tensor, _scalar: &Tensor, _ones: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient.clone()))
    }
}
