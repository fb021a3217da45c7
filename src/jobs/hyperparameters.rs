//! From "auto" to numbers, once the training file has been counted.

use super::{Auto, Hyperparameters, Method};
use crate::data::default_epochs;

/// Sequences per optimizer step, unless asked otherwise.
const DEFAULT_BATCH_SIZE: u32 = 8;
/// DPO's beta, unless asked otherwise.
const DEFAULT_BETA: f64 = 0.1;

/// Peak learning rate of a multiplier of 1, with LoRA.
#[must_use]
pub fn base_learning_rate(method: Method) -> f64 {
    match method {
        Method::Supervised => 2e-4,
        Method::Dpo => 5e-5,
    }
}

impl Hyperparameters {
    /// All values as numbers: the given ones, and for the others what suits `num_examples` rows. The
    /// number of epochs follows OpenAI's rule (3, more for few rows, fewer for very many).
    #[must_use]
    pub fn resolved(self, method: Method, num_examples: usize) -> Self {
        let or = |given: Auto<u32>, default: u32| Auto::Value(given.value().unwrap_or(default));
        let epochs = u32::try_from(default_epochs(num_examples)).unwrap_or(1);
        let beta = self.beta.and_then(Auto::value).unwrap_or(DEFAULT_BETA);
        Self {
            n_epochs: or(self.n_epochs, epochs),
            batch_size: or(self.batch_size, DEFAULT_BATCH_SIZE),
            learning_rate_multiplier: Auto::Value(
                self.learning_rate_multiplier.value().unwrap_or(1.0),
            ),
            beta: (method == Method::Dpo).then_some(Auto::Value(beta)),
        }
    }
}
