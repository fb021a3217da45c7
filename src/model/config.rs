//! `config.json` -> [`ModelConfig`], every knob in which the families differ.

use std::{fs, path::Path};

use serde::{Deserialize, Deserializer};

use super::{ModelError, Projection, arch};
use crate::ops::gated_mlp::Activation;

/// `sliding_window` of the families that have one, where config.json is silent.
pub(super) const DEFAULT_WINDOW: usize = 4096;
/// `max_window_layers` of the Qwen families, where config.json is silent.
const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;

/// How rotary frequencies are stretched for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, the rest blended.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context length of pre-training, tokens.
        original_max_position_embeddings: f64,
    },
}

/// A decoder's shape and constants.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools)]
pub struct ModelConfig {
    /// The family: `model_type` of config.json.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of one head; not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Factor on the scores of attention, `1 / sqrt(head_dim)` as a rule.
    pub attention_scale: f64,
    /// Keys that a query of each layer sees, its own and those right before it; `None`: all before it.
    /// Layers past the end see all.
    pub layer_windows: Vec<Option<usize>>,
    /// Scores of attention become `cap * tanh(score / cap)`.
    pub attention_soft_cap: Option<f64>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logit_soft_cap: Option<f64>,
    /// Each head of queries and keys goes through a norm before its rotation.
    pub qk_norm: bool,
    /// The outputs of attention and feed-forward go through a norm before they are added.
    pub output_norms: bool,
    /// What is added to the weights of all norms.
    pub norm_offset: f64,
    /// Factor on the rows of the embedding table.
    pub embedding_scale: f64,
    /// What the gate of a feed-forward layer goes through.
    pub activation: Activation,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
    /// The output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// The output projection of attention has a bias.
    pub o_bias: bool,
    /// The feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// Longest context, tokens.
    pub max_position_embeddings: usize,
    /// End-of-sequence ids, of generation_config.json where it is there, else of config.json.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads `config.json` (and `generation_config.json`) of a folder in Hub layout.
    ///
    /// # Errors
    /// A file that is missing, is no JSON, names an unknown family or has impossible values.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).map_err(ModelError::io(&path))?;
        let mut config = Self::from_json(&text)
            .map_err(|message| ModelError::Config { path: path.clone(), message })?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(ModelError::io(&path))?;
            let generation: GenerationConfig = serde_json::from_str(&text)
                .map_err(|error| ModelError::Config { path, message: error.to_string() })?;
            if let Some(ids) = generation.eos_token_id {
                config.eos_token_ids = ids.into_vec();
            }
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// What is wrong with it, naming the key and the value.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let raw: RawConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let architecture = arch::find(&raw.model_type)?;
        let config = (architecture.configure)(&raw)?;
        config.check()?;
        Ok(config)
    }

    /// Keys that a query of a layer sees; `None`: all before it.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.layer_windows.get(layer).copied().flatten()
    }

    /// `(in_features, out_features)` of a projection.
    #[must_use]
    pub fn projection_shape(&self, projection: Projection) -> (usize, usize) {
        let (queries, keys) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match projection {
            Projection::Q => (self.hidden_size, queries),
            Projection::K | Projection::V => (self.hidden_size, keys),
            Projection::O => (queries, self.hidden_size),
            Projection::Gate | Projection::Up => (self.hidden_size, self.intermediate_size),
            Projection::Down => (self.intermediate_size, self.hidden_size),
        }
    }

    /// Rotary frequencies of one head, `[head_dim / 2]`, scaling applied.
    #[must_use]
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let half = self.head_dim / 2;
        let plain = (0..half).map(|index| {
            let exponent = (2 * index) as f64 / self.head_dim as f64;
            self.rope_theta.powf(-exponent)
        });
        plain.map(|frequency| scale_frequency(frequency, self.rope_scaling) as f32).collect()
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{name} is 0"));
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (heads, kv) = (self.num_heads, self.num_kv_heads);
            return Err(format!(
                "num_attention_heads {heads} is no multiple of num_key_value_heads {kv}"
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim {} is odd", self.head_dim));
        }
        if self.layer_windows.contains(&Some(0)) {
            return Err("sliding_window is 0".into());
        }
        let caps = [
            ("attn_logit_softcapping", self.attention_soft_cap),
            ("final_logit_softcapping", self.logit_soft_cap),
        ];
        if let Some((name, cap)) = caps.iter().find(|(_, cap)| cap.is_some_and(|cap| cap <= 0.0)) {
            return Err(format!("{name} {} is not positive", cap.unwrap_or_default()));
        }
        Ok(())
    }
}

/// The usual factor on the scores of heads of that size.
#[allow(clippy::cast_precision_loss)]
pub(super) fn inverse_square_root(head_dim: usize) -> f64 {
    1.0 / (head_dim as f64).sqrt()
}

fn scale_frequency(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        } => {
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let smooth = (original / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// The keys of `config.json` that any family reads.
#[derive(Debug, Deserialize)]
pub struct RawConfig {
    pub(super) model_type: String,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    pub(super) rms_norm_eps: Option<f64>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<RawRope>,
    pub(super) rope_parameters: Option<RawRope>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    pub(super) hidden_act: Option<String>,
    pub(super) max_position_embeddings: Option<usize>,
    pub(super) eos_token_id: Option<OneOrMany>,
    pub(super) hidden_activation: Option<String>,
    pub(super) use_sliding_window: Option<bool>,
    /// Not there at all is not the same as null.
    #[serde(default, deserialize_with = "some")]
    pub(super) sliding_window: Option<Option<usize>>,
    pub(super) max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    pub(super) query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "some")]
    pub(super) attn_logit_softcapping: Option<Option<f64>>,
    #[serde(default, deserialize_with = "some")]
    pub(super) final_logit_softcapping: Option<Option<f64>>,
    pub(super) use_bidirectional_attention: Option<bool>,
    pub(super) quantization_config: Option<serde_json::Value>,
}

/// A key that is there, be it null.
fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

#[derive(Debug, Deserialize)]
pub(super) struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
}

/// A token id or a list of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl RawConfig {
    /// What all Llama-shaped families share; a family's file changes what differs.
    pub(super) fn llama_shaped(&self) -> Result<ModelConfig, String> {
        let activation = match self.hidden_act.as_deref().unwrap_or("silu") {
            "silu" => Activation::Silu,
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            act => {
                let known = "\"silu\" and \"gelu_pytorch_tanh\"";
                return Err(format!("hidden_act {act:?} is not supported, only {known}"));
            }
        };
        if self.quantization_config.is_some() {
            return Err("quantization_config is not supported: use the unquantised model".into());
        }
        let bias = self.attention_bias.unwrap_or(false);
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1));
        Ok(ModelConfig {
            model_type: self.model_type.clone(),
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            attention_scale: inverse_square_root(head_dim),
            layer_windows: Vec::new(),
            attention_soft_cap: None,
            logit_soft_cap: None,
            qk_norm: false,
            output_norms: false,
            norm_offset: 0.0,
            embedding_scale: 1.0,
            activation,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: self.rope_theta(),
            rope_scaling: self.rope_scaling()?,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            qkv_bias: bias,
            o_bias: bias,
            mlp_bias: self.mlp_bias.unwrap_or(false),
            max_position_embeddings: self.max_position_embeddings.unwrap_or(2048),
            eos_token_ids: self.eos_token_id.clone().map(OneOrMany::into_vec).unwrap_or_default(),
        })
    }

    /// The windows of all layers: `window` where `layer_types` says `sliding_attention`, or else where
    /// `slides(layer)`.
    pub(super) fn windows(
        &self,
        window: Option<usize>,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, String> {
        let Some(types) = &self.layer_types else {
            let layers = 0..self.num_hidden_layers;
            return Ok(layers.map(|layer| window.filter(|_| slides(layer))).collect());
        };
        if types.len() != self.num_hidden_layers {
            let (types, layers) = (types.len(), self.num_hidden_layers);
            return Err(format!("layer_types has {types} entries for {layers} layers"));
        }
        let of_type = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(window),
            other => Err(format!("layer type {other:?} is not supported")),
        };
        types.iter().map(of_type).collect()
    }

    /// The windows of a Qwen: of the layers from `max_window_layers` on, where `use_sliding_window`.
    pub(super) fn qwen_windows(&self) -> Result<Vec<Option<usize>>, String> {
        let window = self.sliding_window.unwrap_or(Some(DEFAULT_WINDOW));
        let window = window.filter(|_| self.use_sliding_window == Some(true));
        let first = self.max_window_layers.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS);
        self.windows(window, |layer| layer >= first)
    }

    fn rope_theta(&self) -> f64 {
        let nested = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
        self.rope_theta.or(nested).unwrap_or(10_000.0)
    }

    fn rope_scaling(&self) -> Result<RopeScaling, String> {
        let Some(rope) = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref()) else {
            return Ok(RopeScaling::None);
        };
        let kind = rope.rope_type.as_deref().or(rope.old_type.as_deref()).unwrap_or("default");
        let need = |name: &str, value: Option<f64>| {
            value.ok_or_else(|| format!("rope scaling {kind:?} lacks {name}"))
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: need("factor", rope.factor)? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("factor", rope.factor)?,
                low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
                original_max_position_embeddings: need(
                    "original_max_position_embeddings",
                    rope.original_max_position_embeddings,
                )?,
            }),
            other => Err(format!("rope scaling {other:?} is not supported")),
        }
    }
}
