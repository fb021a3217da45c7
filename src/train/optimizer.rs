//! AdamW with 32-bit state that can be saved: candle's own neither clips nor shows its moments.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Var};

use super::TrainError;

/// Constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the gradient's mean.
    pub beta1: f64,
    /// Decay of the squared gradient's mean.
    pub beta2: f64,
    /// Keeps the division finite.
    pub epsilon: f64,
    /// Decoupled weight decay; not applied to norms and biases.
    pub weight_decay: f64,
}

/// The two running means of one parameter, flat.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Of the gradient (`exp_avg`).
    pub mean: Vec<f32>,
    /// Of the squared gradient (`exp_avg_sq`).
    pub mean_square: Vec<f32>,
}

/// AdamW over named parameters, with the arithmetic of `torch.optim.AdamW`.
pub struct AdamW {
    config: AdamWConfig,
    parameters: Vec<(String, Var)>,
    /// In the order of `parameters`.
    moments: Vec<Moments>,
    /// Updates made.
    num_updates: u64,
}

impl AdamW {
    /// An optimizer that has made no update; `parameters` are contiguous f32, sorted by name.
    #[must_use]
    pub fn new(config: AdamWConfig, parameters: Vec<(String, Var)>) -> Self {
        let zeros = |(_, var): &(String, Var)| {
            let count = var.elem_count();
            Moments { mean: vec![0.0; count], mean_square: vec![0.0; count] }
        };
        let moments = parameters.iter().map(zeros).collect();
        Self { config, parameters, moments, num_updates: 0 }
    }

    /// The parameters, sorted by name.
    #[must_use]
    pub fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    /// The running means, in the order of [`AdamW::parameters`].
    #[must_use]
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Updates made so far.
    #[must_use]
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// Continues from saved means; they have the parameters' order and sizes.
    pub fn restore(&mut self, moments: Vec<Moments>, num_updates: u64) {
        self.moments = moments;
        self.num_updates = num_updates;
    }

    /// One update of every parameter in place. `gradients[i]` belongs to parameter i and is
    /// multiplied by `gradient_scale` (clipping) on the way in.
    ///
    /// # Errors
    /// A parameter that is not contiguous f32 in main memory.
    pub fn step(
        &mut self,
        gradients: &[Vec<f32>],
        gradient_scale: f32,
        learning_rate: f64,
    ) -> Result<(), TrainError> {
        self.num_updates += 1;
        let updates = i32::try_from(self.num_updates).unwrap_or(i32::MAX);
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let (correction1, correction2) = (1.0 - beta1.powi(updates), 1.0 - beta2.powi(updates));
        for (((name, var), moments), gradient) in
            self.parameters.iter().zip(&mut self.moments).zip(gradients)
        {
            let decay = if decays(name) { 1.0 - learning_rate * weight_decay } else { 1.0 };
            let rates = Rates {
                rest1: (1.0 - beta1) as f32,
                beta2: beta2 as f32,
                rest2: (1.0 - beta2) as f32,
                epsilon: epsilon as f32,
                decay: decay as f32,
                step_size: (learning_rate / correction1) as f32,
                root_correction2: correction2.sqrt() as f32,
                gradient_scale,
            };
            var.inplace_op1(&Update { rates, gradient, moments: RefCell::new(moments) })?;
        }
        Ok(())
    }
}

/// Whether weight decay applies to the parameter `name`.
fn decays(name: &str) -> bool {
    !(name.ends_with(".bias") || name.contains("norm"))
}

/// The numbers of one update.
struct Rates {
    /// `1 - beta1`
    rest1: f32,
    beta2: f32,
    /// `1 - beta2`
    rest2: f32,
    epsilon: f32,
    /// `1 - learning rate * weight decay`
    decay: f32,
    /// `learning rate / (1 - beta1^t)`
    step_size: f32,
    /// `sqrt(1 - beta2^t)`
    root_correction2: f32,
    gradient_scale: f32,
}

/// One parameter's update, as an operation on its storage: nothing is copied.
struct Update<'a> {
    rates: Rates,
    gradient: &'a [f32],
    /// candle hands out `&self` only.
    moments: RefCell<&'a mut Moments>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("a trained parameter must be contiguous f32");
        };
        let mut moments = self.moments.borrow_mut();
        let Moments { mean, mean_square } = &mut **moments;
        self.rates.apply(&mut values[start..end], self.gradient, mean, mean_square);
        Ok(())
    }
}

impl Rates {
    /// One pass over all elements; the operations are torch's, in torch's order.
    fn apply(&self, values: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32]) {
        for (((value, &gradient), mean), square) in
            values.iter_mut().zip(gradient).zip(mean).zip(square)
        {
            let gradient = gradient * self.gradient_scale;
            *mean += self.rest1 * (gradient - *mean);
            *square = self.beta2 * *square + self.rest2 * (gradient * gradient);
            let divisor = square.sqrt() / self.root_correction2 + self.epsilon;
            *value = *value * self.decay - self.step_size * (*mean / divisor);
        }
    }
}
