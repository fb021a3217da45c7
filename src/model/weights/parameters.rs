//! A model's parameters, made one by one from a folder or at random, in the form that a mode asks for.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};

use super::{RandomWeights, SafetensorsFolder};
use crate::model::{ModelError, WeightMode};
use crate::ops::weight::{Precision, Weight};

/// Where the values come from.
pub(in crate::model) enum Source {
    Folder(SafetensorsFolder),
    Random(Box<RandomWeights>),
}

/// Gives parameters by checkpoint name and shape.
pub(in crate::model) struct Parameters {
    source: Source,
    mode: WeightMode,
    /// What became variables, by name.
    pub(in crate::model) variables: BTreeMap<String, Var>,
}

impl Parameters {
    pub(in crate::model) fn new(source: Source, mode: WeightMode) -> Self {
        Self { source, mode, variables: BTreeMap::new() }
    }

    /// A norm or a bias: small, and used as f32 in every row.
    pub(in crate::model) fn vector(
        &mut self,
        name: &str,
        length: usize,
    ) -> Result<Tensor, ModelError> {
        let tensor = self.tensor(name, &[length])?.to_dtype(DType::F32)?;
        if self.mode == WeightMode::Trainable { self.variable(name, &tensor) } else { Ok(tensor) }
    }

    /// A projection's matrix.
    pub(in crate::model) fn matrix(
        &mut self,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Weight, ModelError> {
        let precision = match self.mode {
            WeightMode::Trainable | WeightMode::Frozen => Precision::Exact,
            WeightMode::Bf16 => Precision::Bf16,
            WeightMode::Int8 => Precision::Int8,
            WeightMode::Int4 => Precision::Int4,
        };
        self.weight(name, shape, precision)
    }

    /// The embedding or the head: every token's first and last step, and sensitive to rounding, so
    /// never below 8 bits.
    pub(in crate::model) fn table(
        &mut self,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Weight, ModelError> {
        let precision = match self.mode {
            WeightMode::Trainable | WeightMode::Frozen => Precision::Exact,
            WeightMode::Bf16 => Precision::Bf16,
            WeightMode::Int8 | WeightMode::Int4 => Precision::Int8,
        };
        self.weight(name, shape, precision)
    }

    fn weight(
        &mut self,
        name: &str,
        shape: [usize; 2],
        precision: Precision,
    ) -> Result<Weight, ModelError> {
        if self.mode == WeightMode::Trainable {
            let tensor = self.tensor(name, &shape)?.to_dtype(DType::F32)?;
            return Ok(Weight::Plain(self.variable(name, &tensor)?));
        }
        match &mut self.source {
            Source::Folder(folder) => {
                let stored = folder.find(name, &shape)?;
                let row_bytes = (shape[1] * stored.dtype.size_in_bytes()) as u64;
                Weight::pack(precision, stored.dtype, shape, |row, bytes: &mut [u8]| {
                    stored.read(row as u64 * row_bytes, bytes)
                })
            }
            Source::Random(weights) => {
                Ok(Weight::pack_tensor(precision, &weights.tensor(name, &shape)?)?)
            }
        }
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        match &mut self.source {
            Source::Folder(folder) => folder.find(name, shape)?.tensor(),
            Source::Random(weights) => Ok(weights.tensor(name, shape)?),
        }
    }

    fn variable(&mut self, name: &str, tensor: &Tensor) -> Result<Tensor, ModelError> {
        let variable = Var::from_tensor(tensor)?;
        let tensor = variable.as_tensor().clone();
        self.variables.insert(name.to_owned(), variable);
        Ok(tensor)
    }
}
