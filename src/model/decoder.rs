//! The decoder: embedding, layers, final norm, head. One forward pass for training and serving.

use std::{collections::BTreeMap, path::Path, str::FromStr, sync::OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::View;
use serde::{Deserialize, Serialize};

use super::{
    ModelConfig, ModelError, Projection, Step,
    layer::{Layer, LayerContext, Linear},
    weights::{Parameters, RandomWeights, SafetensorsFolder, Source},
};
use crate::ops::{
    cross_entropy::cross_entropy, embedding::embedding, linear::linear, rms_norm::rms_norm,
    rope::Angles, weight::Weight,
};
use crate::publish::Sha256Stream;

/// How the weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightMode {
    /// Matrices in the file's dtype; no gradient is ever computed for them.
    Frozen,
    /// As frozen, but matrices are rounded to 8 bits.
    Int8,
    /// As frozen, but projections are rounded to 4 bits, embedding and head to 8.
    Int4,
    /// As f32 variables with gradients, for full fine-tuning.
    Trainable,
}

/// How the matrices of a frozen model are held, as a user says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// In the file's dtype.
    #[default]
    None,
    /// In 8 bits.
    Int8,
    /// Projections in 4 bits, embedding and head in 8.
    Int4,
}

impl From<Quantization> for WeightMode {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::None => Self::Frozen,
            Quantization::Int8 => Self::Int8,
            Quantization::Int4 => Self::Int4,
        }
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            other => Err(format!("{other:?} is not none, int8 or int4")),
        }
    }
}

/// A decoder-only language model. Immutable after load, but for variables that an optimizer sets.
pub struct Decoder {
    config: ModelConfig,
    embedding: Weight,
    pub(super) layers: Vec<Layer>,
    norm: Tensor,
    /// `None`: tied to the embedding.
    head: Option<Weight>,
    inverse_frequencies: Vec<f32>,
    variables: BTreeMap<String, Var>,
    /// The dtype of the checkpoint's matrices.
    dtype: DType,
    fingerprint: OnceLock<String>,
}

impl Decoder {
    /// Reads config and weights of a folder in Hub layout.
    ///
    /// # Errors
    /// A missing or broken file, named; a tensor that is missing or has another shape than
    /// `config.json` asks for.
    pub fn load(dir: &Path, mode: WeightMode) -> Result<Self, ModelError> {
        let config = ModelConfig::from_dir(dir)?;
        let folder = SafetensorsFolder::open(dir)?;
        let decoder = Self::build(config, mode, Source::Folder(folder))?;
        if matches!(mode, WeightMode::Int8 | WeightMode::Int4) {
            // An adapter belongs to the weights as they were, so these are read once more.
            let folder = SafetensorsFolder::open(dir)?;
            let fingerprint = decoder.hash(|name, parameter| match parameter {
                Parameter::Vector(_) => decoder.original(parameter),
                Parameter::Matrix(weight) => {
                    folder.find(name, &<[usize; 2]>::from(weight.dims2()?))?.tensor()
                }
            })?;
            decoder.fingerprint.get_or_init(|| fingerprint);
        }
        Ok(decoder)
    }

    /// Whether a folder has weights, rather than a configuration only.
    #[must_use]
    pub fn has_weights(dir: &Path) -> bool {
        SafetensorsFolder::exists(dir)
    }

    /// Fresh trainable weights, reproducible from `seed`.
    ///
    /// # Errors
    /// A configuration whose tensors cannot be made.
    pub fn random(config: ModelConfig, seed: u64) -> Result<Self, ModelError> {
        let source = Source::Random(Box::new(RandomWeights::new(seed)));
        Self::build(config, WeightMode::Trainable, source)
    }

    fn build(config: ModelConfig, mode: WeightMode, source: Source) -> Result<Self, ModelError> {
        let mut parameters = Parameters::new(source, mode);
        let table = [config.vocab_size, config.hidden_size];
        let embedding = parameters.table(EMBEDDING, table)?;
        let layers = (0..config.num_layers)
            .map(|index| Layer::build(&config, index, &mut parameters))
            .collect::<Result<_, _>>()?;
        let norm = parameters.vector(NORM, config.hidden_size)?;
        let head =
            if config.tie_word_embeddings { None } else { Some(parameters.table(HEAD, table)?) };
        let inverse_frequencies = config.inverse_frequencies();
        Ok(Self {
            config,
            dtype: embedding.dtype(),
            embedding,
            layers,
            norm,
            head,
            inverse_frequencies,
            variables: parameters.variables,
            fingerprint: OnceLock::new(),
        })
    }

    /// The model's shape and constants.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// SHA-256 over names, dtypes, shapes and bytes of all weights as they are in the file, in hex:
    /// which base an adapter belongs to. Computed at the first call, or at load if weights are rounded.
    ///
    /// # Panics
    /// Where there is no memory for one more matrix.
    pub fn fingerprint(&self) -> &str {
        self.fingerprint.get_or_init(|| {
            self.hash(|_, parameter| self.original(parameter)).expect("memory for a matrix")
        })
    }

    /// One tensor at a time is held.
    fn hash(
        &self,
        tensor: impl Fn(&str, Parameter<'_>) -> Result<Tensor, ModelError>,
    ) -> Result<String, ModelError> {
        let mut hash = Sha256Stream::new();
        for (name, parameter) in self.named() {
            let tensor = tensor(&name, parameter)?;
            hash.update(format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.dims()).as_bytes());
            hash.update(&View::data(&tensor));
        }
        Ok(hash.finish())
    }

    /// Bytes of all weights in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let bytes = |parameter| match parameter {
            Parameter::Vector(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Parameter::Matrix(weight) => weight.num_bytes(),
        };
        self.named().into_values().map(bytes).sum()
    }

    /// Number of weights.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        let count = |parameter| match parameter {
            Parameter::Vector(tensor) => tensor.elem_count(),
            Parameter::Matrix(weight) => weight.elem_count(),
        };
        self.named().into_values().map(count).sum()
    }

    /// The trainable weights by checkpoint name, sorted; empty when frozen.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, Var)> {
        self.variables.iter().map(|(name, variable)| (name.clone(), variable.clone())).collect()
    }

    /// All weights by checkpoint name, sorted, in the dtype of the checkpoint: bit for bit its own,
    /// unless matrices are rounded.
    ///
    /// # Panics
    /// Where there is no memory for them.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let original = |parameter| self.original(parameter).expect("memory for a matrix");
        self.named().into_iter().map(|(name, parameter)| (name, original(parameter))).collect()
    }

    /// A parameter in the dtype of the checkpoint.
    fn original(&self, parameter: Parameter<'_>) -> Result<Tensor, ModelError> {
        Ok(match parameter {
            Parameter::Matrix(weight) => weight.to_tensor()?,
            Parameter::Vector(tensor) => tensor.detach().to_dtype(self.dtype)?,
        })
    }

    fn named(&self) -> BTreeMap<String, Parameter<'_>> {
        let mut named = BTreeMap::new();
        named.insert(EMBEDDING.to_owned(), Parameter::Matrix(&self.embedding));
        named.insert(NORM.to_owned(), Parameter::Vector(&self.norm));
        if let Some(head) = &self.head {
            named.insert(HEAD.to_owned(), Parameter::Matrix(head));
        }
        for layer in &self.layers {
            let prefix = format!("model.layers.{}", layer.index);
            for (norm, tensor) in [
                ("input_layernorm", &layer.input_norm),
                ("post_attention_layernorm", &layer.post_attention_norm),
            ] {
                named.insert(format!("{prefix}.{norm}.weight"), Parameter::Vector(tensor));
            }
            for (projection, Linear { weight, bias }) in
                Projection::ALL.into_iter().zip(&layer.projections)
            {
                let name = format!("{prefix}.{}", projection.path());
                if let Some(bias) = bias {
                    named.insert(format!("{name}.bias"), Parameter::Vector(bias));
                }
                named.insert(format!("{name}.weight"), Parameter::Matrix(weight));
            }
        }
        named
    }

    /// Logits of the step's `logit_rows`, `[rows, vocab]`, f32.
    ///
    /// # Errors
    /// A step that does not describe a batch, or a failed tensor operation.
    pub fn forward(&self, step: &Step<'_>) -> Result<Tensor, ModelError> {
        let hidden = select(&self.hidden(step)?, step.logit_rows)?;
        Ok(linear(&hidden, self.head(), None)?)
    }

    /// Hidden states after the final norm, `[tokens, hidden]`, f32.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn hidden(&self, step: &Step<'_>) -> Result<Tensor, ModelError> {
        let (angles, layout) = (self.angles(step)?, step.layout()?);
        let context = LayerContext {
            angles: &angles,
            layout: &layout,
            deltas: step.deltas,
            dropout: step.dropout,
        };
        let mut x = self.embed(step)?;
        for layer in &self.layers {
            x = layer.forward(&x, &context)?;
        }
        self.final_norm(&x)
    }

    /// Cosines and sines of the step's positions.
    pub(super) fn angles(&self, step: &Step<'_>) -> Result<Angles, ModelError> {
        Ok(Angles::new(&step.positions()?, &self.inverse_frequencies))
    }

    /// What the first layer takes, `[tokens, hidden]`, f32.
    pub(super) fn embed(&self, step: &Step<'_>) -> Result<Tensor, ModelError> {
        Ok(embedding(&self.embedding, step.tokens)?)
    }

    /// The norm behind the last layer.
    pub(super) fn final_norm(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(rms_norm(x, &self.norm, self.config.rms_norm_eps)?)
    }

    /// Losses of some rows of [`Self::hidden`] against `targets`; whole logits are never held.
    /// Returns `[2, rows]`, f32: row 0 the negative log-likelihoods (differentiable), row 1 is 1
    /// where the target has the greatest logit.
    ///
    /// # Errors
    /// Rows or targets out of range, or a failed tensor operation.
    pub fn token_losses(
        &self,
        hidden: &Tensor,
        rows: &[u32],
        targets: &[u32],
    ) -> Result<Tensor, ModelError> {
        Ok(cross_entropy(&select(hidden, rows)?, self.head(), targets)?)
    }

    fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// One of the model's parameters.
#[derive(Clone, Copy)]
enum Parameter<'a> {
    Vector(&'a Tensor),
    Matrix(&'a Weight),
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

fn select(hidden: &Tensor, rows: &[u32]) -> Result<Tensor, ModelError> {
    let rows = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
    Ok(hidden.index_select(&rows, 0)?)
}
