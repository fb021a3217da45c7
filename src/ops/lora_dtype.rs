//! The numbers that a served adapter's A and B are held in.

use std::str::FromStr;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::kernels::{PackedWeight, WeightForm};

/// How A and B are held, as a user says it: vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraDtype {
    /// Every value as it is: a matrix takes 16 bits where each of its values is one of bf16 or of f16, else 32.
    #[default]
    Auto,
    /// Rounded to f16: a relative error of 2^-12 at most, above 6e-5.
    #[serde(alias = "f16")]
    Float16,
    /// Rounded to bf16: a relative error of 2^-9 at most.
    #[serde(alias = "bf16")]
    Bfloat16,
    /// Every value as it is, in 32 bits.
    #[serde(alias = "f32")]
    Float32,
}

impl LoraDtype {
    /// What a user calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float32 => "float32",
        }
    }

    /// Whether values change that have more bits.
    #[must_use]
    pub fn rounds(self) -> bool {
        matches!(self, Self::Float16 | Self::Bfloat16)
    }

    /// What becomes of a value; infinite where it is too large.
    #[must_use]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::Auto | Self::Float32 => value,
            Self::Float16 => f16::from_f32(value).to_f32(),
            Self::Bfloat16 => bf16::from_f32(value).to_f32(),
        }
    }

    pub(super) fn pack(self, values: &[f32], columns: usize) -> PackedWeight {
        match self {
            Self::Auto => PackedWeight::from_f32_exact(values, columns),
            Self::Float16 => PackedWeight::from_f32(WeightForm::F16, values, columns),
            Self::Bfloat16 => PackedWeight::from_f32(WeightForm::Bf16, values, columns),
            Self::Float32 => PackedWeight::from_f32(WeightForm::F32, values, columns),
        }
    }
}

impl FromStr for LoraDtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "float16" | "f16" => Ok(Self::Float16),
            "bfloat16" | "bf16" => Ok(Self::Bfloat16),
            "float32" | "f32" => Ok(Self::Float32),
            other => Err(format!("{other:?} is not auto, float16, bfloat16 or float32")),
        }
    }
}
