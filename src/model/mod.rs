//! FLOOR 2. The one definition of the decoder, for training and for serving.
//!
//! Knows tensors, weights and the families. Must never know text, requests, schedulers or HTTP; an
//! adapter is only a [`Delta`] here.

mod arch;
mod config;
mod decoder;
mod delta;
mod error;
mod inside;
mod kv_cache;
mod layer;
mod layered;
mod norm;
mod step;
mod tables;
mod training;
mod weights;

pub use arch::{ARCHITECTURES, Architecture};
pub use config::{ModelConfig, RopeScaling};
pub use decoder::{Decoder, Quantization, WeightMode};
pub use delta::{Delta, DeltaRows, Dropout, OwnTable, Projected, Projection, Site, Table};
pub use error::ModelError;
pub use kv_cache::{KvCache, KvDtype};
pub use layered::{LayeredPass, Recompute};
pub use step::{Step, StepSequence};
