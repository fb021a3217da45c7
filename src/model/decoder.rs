//! The decoder: embedding, layers, final norm, head. One forward pass for training and serving.

use std::{collections::BTreeMap, path::Path, str::FromStr, sync::OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::View;
use serde::{Deserialize, Serialize};

use super::{
    DeltaRows, ModelConfig, ModelError, Projection, Site, Step, Table,
    layer::{Layer, LayerContext, Linear, work},
    norm::Norm,
    tables,
    training::with_noise,
    weights::{Parameters, RandomWeights, SafetensorsFolder, Source},
};
use crate::ops::{
    profile::{self, Op},
    rope::Angles,
    soft_cap::soft_cap,
    weight::Weight,
};
use crate::publish::Sha256Stream;

/// How the weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightMode {
    /// Matrices in the file's dtype; no gradient is ever computed for them.
    Frozen,
    /// As frozen, but matrices are rounded to bf16, and so are the inputs of their products.
    Bf16,
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
    /// In bf16, and so are the inputs of their products.
    Bf16,
    /// In 8 bits.
    Int8,
    /// Projections in 4 bits, embedding and head in 8.
    Int4,
}

impl From<Quantization> for WeightMode {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::None => Self::Frozen,
            Quantization::Bf16 => Self::Bf16,
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
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            other => Err(format!("{other:?} is not none, bf16, int8 or int4")),
        }
    }
}

/// A decoder-only language model. Immutable after load, but for variables that an optimizer sets.
pub struct Decoder {
    config: ModelConfig,
    embedding: Weight,
    pub(super) layers: Vec<Layer>,
    norm: Norm,
    /// `None`: tied to the embedding.
    head: Option<Weight>,
    inverse_frequencies: Vec<f32>,
    variables: BTreeMap<String, Var>,
    /// The dtype of the checkpoint's matrices.
    dtype: DType,
    fingerprint: OnceLock<String>,
    /// The files that rounded weights were made of.
    originals: Option<SafetensorsFolder>,
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
        // An adapter belongs to the weights as they were, which are read once more where that is asked.
        let is_rounded = matches!(mode, WeightMode::Bf16 | WeightMode::Int8 | WeightMode::Int4);
        let originals = if is_rounded { Some(folder.clone()) } else { None };
        Ok(Self { originals, ..Self::build(config, mode, Source::Folder(folder))? })
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
        let source = Source::Random(Box::new(RandomWeights::new(seed, config.norm_offset)));
        Self::build(config, WeightMode::Trainable, source)
    }

    fn build(config: ModelConfig, mode: WeightMode, source: Source) -> Result<Self, ModelError> {
        let mut parameters = Parameters::new(source, mode);
        let table = [config.vocab_size, config.hidden_size];
        let embedding = parameters.table(EMBEDDING, table)?;
        let layers = (0..config.num_layers)
            .map(|index| Layer::build(&config, index, &mut parameters))
            .collect::<Result<_, _>>()?;
        let norm = Norm::build(&config, NORM, config.hidden_size, &mut parameters)?;
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
            originals: None,
        })
    }

    /// The model's shape and constants.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// SHA-256 over names, dtypes, shapes and bytes of all weights as they are in the file, in hex:
    /// which base an adapter belongs to. Computed at the first call, in about a second for each two
    /// gigabytes. Where rounded weights' file cannot be read any more, a text that says so and that no
    /// adapter was made for.
    pub fn fingerprint(&self) -> &str {
        self.fingerprint
            .get_or_init(|| self.hash().unwrap_or_else(|error| format!("unknown ({error})")))
    }

    /// A part of one matrix is held at a time.
    fn hash(&self) -> Result<String, ModelError> {
        let mut hash = Sha256Stream::new();
        let begin = |name: &str, dtype: DType, dims: &[usize]| {
            format!("{name} {dtype:?} {dims:?}\n").into_bytes()
        };
        for (name, parameter) in self.named() {
            match (parameter, &self.originals) {
                (Parameter::Vector(_), _) => {
                    let tensor = self.original(parameter)?;
                    hash.update(&begin(&name, tensor.dtype(), tensor.dims()));
                    hash.update(&View::data(&tensor));
                }
                (Parameter::Matrix(weight), None) => {
                    hash.update(&begin(
                        &name,
                        weight.dtype(),
                        &<[usize; 2]>::from(weight.dims2()?),
                    ));
                    weight.for_each_bytes(|bytes| hash.update(bytes))?;
                }
                (Parameter::Matrix(weight), Some(originals)) => {
                    let stored = originals.find(&name, &<[usize; 2]>::from(weight.dims2()?))?;
                    hash.update(&begin(&name, stored.dtype, &<[usize; 2]>::from(weight.dims2()?)));
                    stored.for_each_bytes(|bytes| hash.update(bytes))?;
                }
            }
        }
        Ok(hash.finish())
    }

    /// SHA-256 over names, shapes, and the first row of each matrix as it is held, in hex: tells models
    /// apart that were trained apart, at once.
    ///
    /// # Panics
    /// Where there is no memory for a row.
    #[must_use]
    pub fn quick_fingerprint(&self) -> String {
        let mut hash = Sha256Stream::new();
        for (name, parameter) in self.named() {
            let (dims, row) = match parameter {
                Parameter::Vector(tensor) => (tensor.dims().to_vec(), tensor.to_vec1::<f32>()),
                Parameter::Matrix(weight) => {
                    let (rows, columns) = weight.dims2().expect("a matrix has two dimensions");
                    (vec![rows, columns], weight.row(0))
                }
            };
            hash.update(format!("{name} {dims:?}\n").as_bytes());
            let row = row.expect("memory for a row");
            row.iter().for_each(|value| hash.update(&value.to_le_bytes()));
        }
        hash.finish()
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
        let (prefix, name) = NORM;
        let norm = Parameter::Vector(&self.norm.weight);
        named.insert(format!("{prefix}.{name}.weight"), norm);
        if let Some(head) = &self.head {
            named.insert(HEAD.to_owned(), Parameter::Matrix(head));
        }
        for layer in &self.layers {
            let prefix = format!("model.layers.{}", layer.index);
            for norm in layer.norms.all() {
                let name = format!("{prefix}.{}.weight", norm.name);
                named.insert(name, Parameter::Vector(&norm.weight));
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

    /// Weight and bias of a projection.
    ///
    /// # Panics
    /// Where the model has no such layer.
    #[must_use]
    pub fn projection(&self, site: Site) -> (&Weight, Option<&Tensor>) {
        let Linear { weight, bias } =
            &self.layers[site.layer].projections[site.projection as usize];
        (weight, bias.as_ref())
    }

    /// The embedding or the head, `[vocab, hidden]`; one matrix if they are tied.
    #[must_use]
    pub fn table(&self, table: Table) -> &Weight {
        match table {
            Table::Embedding => &self.embedding,
            Table::Head => self.head(),
        }
    }

    /// Logits of the step's `logit_rows`, `[rows, vocab]`, f32.
    ///
    /// # Errors
    /// A step that does not describe a batch, or a failed tensor operation.
    pub fn forward(&self, step: &Step<'_>) -> Result<Tensor, ModelError> {
        let hidden = select(&self.hidden(step)?, step.logit_rows)?;
        let _time = profile::time(Op::Head).work(|| work(&hidden, self.head()));
        let logits = tables::logits(self.head(), &hidden, step.logit_rows, step.deltas)?;
        Ok(match self.config.logit_soft_cap {
            Some(cap) => soft_cap(&logits, cap)?,
            None => logits,
        })
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
        let x = tables::embed(&self.embedding, step.tokens, step.deltas)?;
        let x = with_noise(x, step)?;
        if self.config.embedding_scale == 1.0 {
            return Ok(x);
        }
        Ok((x * self.config.embedding_scale)?)
    }

    /// The norm behind the last layer.
    pub(super) fn final_norm(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.norm.forward(x)
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
        self.token_losses_of(hidden, rows, targets, &[])
    }

    /// [`Self::token_losses`] under the heads of the adapters in `deltas`, as they were in the step.
    ///
    /// # Errors
    /// As [`Self::token_losses`].
    pub fn token_losses_of(
        &self,
        hidden: &Tensor,
        rows: &[u32],
        targets: &[u32],
        deltas: &[DeltaRows],
    ) -> Result<Tensor, ModelError> {
        let (hidden, cap) = (select(hidden, rows)?, self.config.logit_soft_cap);
        tables::losses(self.head(), (&hidden, cap), (rows, targets), deltas)
    }

    pub(super) fn head(&self) -> &Weight {
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
const NORM: (&str, &str) = ("model", "norm");
const HEAD: &str = "lm_head.weight";

pub(super) fn select(hidden: &Tensor, rows: &[u32]) -> Result<Tensor, ModelError> {
    let rows = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
    Ok(hidden.index_select(&rows, 0)?)
}
