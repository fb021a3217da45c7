//! The decoder: embedding, layers, final norm, head. One forward pass for training and serving.

use std::{collections::BTreeMap, path::Path, sync::OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::View;

use super::{
    ModelConfig, ModelError, Projection, Step,
    layer::{Layer, LayerContext, Linear},
    weights::{RandomWeights, SafetensorsFolder},
};
use crate::ops::{
    cross_entropy::cross_entropy, embedding::embedding, linear::linear, rms_norm::rms_norm,
    rope::Angles,
};
use crate::publish::Sha256Stream;

/// How the weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightMode {
    /// Matrices in the file's dtype; no gradient is ever computed for them.
    Frozen,
    /// As f32 variables with gradients, for full fine-tuning.
    Trainable,
}

/// A decoder-only language model. Immutable after load, but for variables that an optimizer sets.
pub struct Decoder {
    config: ModelConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `None`: tied to the embedding.
    head: Option<Tensor>,
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
        let mut folder = SafetensorsFolder::read(dir)?;
        Self::build(config, mode, |name, shape| folder.take(name, shape))
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
        let mut weights = RandomWeights::new(seed);
        Self::build(config, WeightMode::Trainable, |name, shape| Ok(weights.tensor(name, shape)?))
    }

    fn build(
        config: ModelConfig,
        mode: WeightMode,
        mut source: impl FnMut(&str, &[usize]) -> Result<Tensor, ModelError>,
    ) -> Result<Self, ModelError> {
        let mut variables = BTreeMap::new();
        let mut dtype = DType::F32;
        let mut tensor = |name: &str, shape: &[usize]| -> Result<Tensor, ModelError> {
            let tensor = source(name, shape)?;
            if name == EMBEDDING {
                dtype = tensor.dtype();
            }
            match mode {
                WeightMode::Trainable => {
                    let variable = Var::from_tensor(&tensor.to_dtype(DType::F32)?)?;
                    let tensor = variable.as_tensor().clone();
                    variables.insert(name.to_owned(), variable);
                    Ok(tensor)
                }
                // Norms and biases are small and used as f32 in every row.
                WeightMode::Frozen if shape.len() == 1 => Ok(tensor.to_dtype(DType::F32)?),
                WeightMode::Frozen => Ok(tensor),
            }
        };
        let table = [config.vocab_size, config.hidden_size];
        let embedding = tensor(EMBEDDING, &table)?;
        let layers = (0..config.num_layers)
            .map(|index| Layer::build(&config, index, &mut tensor))
            .collect::<Result<_, _>>()?;
        let norm = tensor(NORM, &[config.hidden_size])?;
        let head = if config.tie_word_embeddings { None } else { Some(tensor(HEAD, &table)?) };
        let inverse_frequencies = config.inverse_frequencies();
        let fingerprint = OnceLock::new();
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            inverse_frequencies,
            variables,
            dtype,
            fingerprint,
        })
    }

    /// The model's shape and constants.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// SHA-256 over names, dtypes, shapes and bytes of all weights, in hex: which base an adapter
    /// belongs to. Computed at the first call.
    pub fn fingerprint(&self) -> &str {
        self.fingerprint.get_or_init(|| {
            let mut hash = Sha256Stream::new();
            for (name, tensor) in self.tensors() {
                hash.update(
                    format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.dims()).as_bytes(),
                );
                hash.update(&View::data(&tensor));
            }
            hash.finish()
        })
    }

    /// Bytes of all weights in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.named().map(|(_, tensor)| bytes(tensor)).sum()
    }

    /// Number of weights.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.named().map(|(_, tensor)| tensor.elem_count()).sum()
    }

    /// The trainable weights by checkpoint name, sorted; empty when frozen.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, Var)> {
        self.variables.iter().map(|(name, variable)| (name.clone(), variable.clone())).collect()
    }

    /// All weights by checkpoint name, sorted, in the dtype of the checkpoint.
    ///
    /// # Panics
    /// Never: casts between f32, f16 and bf16 on the CPU do not fail.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let dtype = if self.variables.is_empty() { self.dtype } else { DType::F32 };
        let cast = |tensor: &Tensor| {
            let tensor = tensor.detach();
            if tensor.dims().len() == 1 {
                tensor.to_dtype(dtype).expect("a cast of float dtypes")
            } else {
                tensor
            }
        };
        let tensors: BTreeMap<_, _> =
            self.named().map(|(name, tensor)| (name, cast(tensor))).collect();
        tensors.into_iter().collect()
    }

    fn named(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let layers = self.layers.iter().flat_map(|layer| {
            let prefix = format!("model.layers.{}", layer.index);
            let norms = [
                (format!("{prefix}.input_layernorm.weight"), &layer.input_norm),
                (format!("{prefix}.post_attention_layernorm.weight"), &layer.post_attention_norm),
            ];
            let matrices = Projection::ALL.into_iter().zip(&layer.projections).flat_map(
                move |(projection, Linear { weight, bias })| {
                    let name = format!("{prefix}.{}", projection.path());
                    let bias = bias.as_ref().map(|bias| (format!("{name}.bias"), bias));
                    std::iter::once((format!("{name}.weight"), weight)).chain(bias)
                },
            );
            norms.into_iter().chain(matrices)
        });
        let outer = [
            (EMBEDDING, Some(&self.embedding)),
            (NORM, Some(&self.norm)),
            (HEAD, self.head.as_ref()),
        ];
        let outer = outer.into_iter().filter_map(|(name, tensor)| Some((name.to_owned(), tensor?)));
        outer.chain(layers)
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
        let angles = Angles::new(&step.positions()?, &self.inverse_frequencies);
        let layout = step.layout()?;
        let context = LayerContext {
            angles: &angles,
            layout: &layout,
            deltas: step.deltas,
            dropout: step.dropout,
        };
        let mut x = embedding(&self.embedding, step.tokens)?;
        for layer in &self.layers {
            x = layer.forward(&x, &context)?;
        }
        Ok(rms_norm(&x, &self.norm, self.config.rms_norm_eps)?)
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

    fn head(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

fn select(hidden: &Tensor, rows: &[u32]) -> Result<Tensor, ModelError> {
    let rows = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
    Ok(hidden.index_select(&rows, 0)?)
}
