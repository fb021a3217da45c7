//! Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>), in the
//! half-rotation form of the Hugging Face checkpoints.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    profile::{Op, time},
    storage::{f32_slice, mismatch},
};
use crate::kernels::for_each_rows;

const NAME: &str = "rope";

/// Cosines and sines of the rows of one step; shared by all its layers.
#[derive(Clone)]
pub struct Angles {
    /// `[rows, head_dim / 2]`
    cos: Arc<[f32]>,
    /// `[rows, head_dim / 2]`
    sin: Arc<[f32]>,
    half: usize,
}

impl Angles {
    /// The angles `position * inverse_frequency` of each row.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn new(positions: &[u32], inverse_frequencies: &[f32]) -> Self {
        let angles = || {
            positions.iter().flat_map(|position| {
                inverse_frequencies.iter().map(move |frequency| *position as f32 * frequency)
            })
        };
        Self {
            cos: angles().map(f32::cos).collect(),
            sin: angles().map(f32::sin).collect(),
            half: inverse_frequencies.len(),
        }
    }
}

/// Rotates every head of `x [rows, heads * head_dim]`.
///
/// # Errors
/// Where shapes or dtypes do not fit.
pub fn rope(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let _time = time(Op::Rope);
    x.contiguous()?.apply_op1(Rope { angles: angles.clone(), direction: 1.0 })
}

struct Rope {
    angles: Angles,
    /// 1 forwards, -1 backwards: the gradient is rotated by the opposite angle.
    direction: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = f32_slice(storage, layout, NAME)?.to_vec();
        rotate(&mut out, layout.shape().dims2()?, &self.angles, self.direction)?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let inverse = Self { angles: self.angles.clone(), direction: -self.direction };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&inverse)?))
    }
}

/// Rotates every head of `[rows, width]` by the angles, or by the opposite ones for a `direction` of -1.
pub(super) fn rotate(
    x: &mut [f32],
    (rows, width): (usize, usize),
    angles: &Angles,
    direction: f32,
) -> Result<()> {
    let half = angles.half;
    if angles.cos.len() != rows * half || width % (2 * half) != 0 {
        return Err(mismatch(NAME, &format!("x [{rows}, {width}], half a head is {half}")));
    }
    for_each_rows(x, width, 4 * width, |first, x| {
        for (index, row) in x.chunks_exact_mut(width).enumerate() {
            let angle = (first + index) * half..(first + index + 1) * half;
            let (cos, sin) = (&angles.cos[angle.clone()], &angles.sin[angle]);
            for head in row.chunks_exact_mut(2 * half) {
                let (left, right) = head.split_at_mut(half);
                for (((l, r), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                    let sin = sin * direction;
                    (*l, *r) = (*l * cos - *r * sin, *r * cos + *l * sin);
                }
            }
        }
    });
    Ok(())
}
