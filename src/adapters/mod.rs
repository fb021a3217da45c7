//! FLOOR 3. LoRA adapters: PEFT folders in and out, versions by content, the registry.
//!
//! Knows the model's projections and the format of PEFT; must never know requests, HTTP or training
//! loops. What it reads comes from strangers: it is bounded, checked and used to the last tensor, or
//! refused with a reason.

mod card;
mod digest;
mod dora;
mod error;
mod files;
mod lora;
mod merge;
mod module;
mod peft;
mod peft_config;
mod peft_fields;
mod plain;
mod plan;
mod registry;
mod site;
mod size;
mod tables;
mod variant;

pub use card::{AdapterCard, CurvePoint, check_base};
pub use error::AdapterError;
pub use files::LoadLimits;
pub use lora::LoraAdapter;
pub use merge::{merged_weights, write_weights};
pub use module::LoraModule;
pub use plan::LoraConfig;
pub use registry::{AdapterRegistry, AdapterVersion};
pub use size::AdapterSize;
pub use variant::variant_names;
