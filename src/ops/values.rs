//! Values moved out of a tensor and back into it, while a graph goes on holding the tensor.
//!
//! A graph holds the inputs and outputs of all its operations, also those that no gradient asks for and those that
//! cost next to nothing to make again. Whoever knows which these are takes their values between the passes.
//! An operation that reads an empty tensor fails by name; it never computes with other values.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};

use super::storage::mismatch;

const NAME: &str = "exchange";

/// Takes the values of an f32 tensor, and of all tensors that share them; it has none from then on.
///
/// # Errors
/// Another dtype or another device.
pub fn take(tensor: &Tensor) -> Result<Vec<f32>> {
    exchange(tensor, Vec::new())
}

/// Moves the values of `from`, which has the same shape, into `tensor`.
///
/// # Errors
/// Another shape, another dtype or another device.
pub fn put_back(tensor: &Tensor, from: &Tensor) -> Result<()> {
    let values = take(from)?;
    if values.len() != tensor.elem_count() {
        return Err(mismatch(NAME, &format!("{} values for {:?}", values.len(), tensor.dims())));
    }
    exchange(tensor, values).map(drop)
}

fn exchange(tensor: &Tensor, values: Vec<f32>) -> Result<Vec<f32>> {
    let op = Exchange(Mutex::new(values));
    tensor.inplace_op1(&op)?;
    Ok(op.0.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Leaves the storage's values in place of its own.
struct Exchange(Mutex<Vec<f32>>);

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(own) = storage else {
            return Err(mismatch(NAME, "the values are not f32"));
        };
        if layout.start_offset() != 0 || !layout.is_contiguous() {
            return Err(mismatch(NAME, "the tensor is a part of another"));
        }
        std::mem::swap(own, &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::add::add;

    #[test]
    fn what_was_taken_is_missed_by_name_and_the_same_when_it_is_back() {
        let x = Tensor::new(&[[1.0_f32, 2.0], [3.0, 4.0]], &Device::Cpu).expect("a small tensor");
        let view = x.reshape(4).expect("the same values");
        let values = take(&x).expect("f32 on the CPU");
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0]);
        let error = add(&view, &view).expect_err("there is nothing to add").to_string();
        assert!(error.contains("add: the values"), "{error}");
        let short = Tensor::new(&[1.0_f32], &Device::Cpu).expect("a small tensor");
        assert!(put_back(&x, &short).is_err());
        let again = Tensor::from_vec(values, 4, &Device::Cpu).expect("four values");
        put_back(&x, &again).expect("as many values");
        assert_eq!(view.to_vec1::<f32>().expect("they are back"), [1.0, 2.0, 3.0, 4.0]);
    }
}
