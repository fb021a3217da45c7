//! Gradients of a whole accumulation window, summed over its micro-batches.

use candle_core::{DType, Storage, Tensor, Var, backprop::GradStore};

use super::TrainError;

/// Sums of gradients, one flat buffer per parameter, kept from step to step.
pub struct Gradients {
    sums: Vec<Vec<f32>>,
    /// Whether the buffers hold nothing yet: the next gradient is copied, not added.
    empty: bool,
}

impl Gradients {
    /// Buffers for `parameters`, in their order.
    #[must_use]
    pub fn new(parameters: &[(String, Var)]) -> Self {
        let sums = parameters.iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect();
        Self { sums, empty: true }
    }

    /// Starts the next window.
    pub fn clear(&mut self) {
        self.empty = true;
    }

    /// Adds the gradients of one backward pass.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] names a parameter that the loss does not depend on: a graph that
    /// is cut somewhere must not pass for training.
    pub fn add(
        &mut self,
        parameters: &[(String, Var)],
        mut store: GradStore,
    ) -> Result<(), TrainError> {
        for ((name, var), sum) in parameters.iter().zip(&mut self.sums) {
            let missing = || TrainError::NoGradient { parameter: name.clone() };
            let gradient = store.remove(var).ok_or_else(missing)?;
            add_to(sum, &gradient, self.empty)?;
        }
        self.empty = false;
        Ok(())
    }

    /// The sums, in the order of the parameters.
    #[must_use]
    pub fn sums(&self) -> &[Vec<f32>] {
        &self.sums
    }

    /// The global L2 norm. Summed in a fixed order, so that it is the same bits on every machine
    /// and with any number of threads.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.sums.iter().map(|sum| sum_of_squares(sum)).sum::<f64>().sqrt()
    }
}

/// The factor that brings a gradient of norm `norm` down to `limit`, as `clip_grad_norm_` has it.
#[must_use]
pub fn clip_factor(norm: f64, limit: f64) -> f32 {
    if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

fn add_to(sum: &mut [f32], gradient: &Tensor, overwrite: bool) -> Result<(), TrainError> {
    let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
    else {
        unreachable!("the gradient was made contiguous, and training runs on the CPU")
    };
    let gradient = &storage.as_slice::<f32>()?[start..end];
    if overwrite {
        sum.copy_from_slice(gradient);
    } else {
        sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
    }
    Ok(())
}

/// Eight running sums, so that the loop can use vector registers without changing its result.
fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0_f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|&value| f64::from(value).powi(2)).sum();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    lanes.iter().sum::<f64>() + rest
}
