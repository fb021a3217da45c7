//! The values that a setting of a run may have.

use candle_core::DType;
use serde::{Deserialize, Deserializer, Serialize};

use super::check::require;
use crate::data::LossOn;
use crate::model::{Projection, Recompute};
use crate::train::TrainError;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A LoRA adapter over the frozen base.
    Lora,
    /// Every weight; from random ones where the model folder has none.
    Full,
}

/// What the loss is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Supervised: the negative log-likelihood of the trained tokens.
    Sft,
    /// Direct preference optimization: that preferred answers gain on the others, compared with the
    /// adapter at the start.
    Dpo,
    /// Odds-ratio preference optimization: the likelihood of the preferred answers, and that their odds
    /// are better than the others'.
    Orpo,
}

impl Objective {
    /// Whether its rows are pairs of answers.
    #[must_use]
    pub fn wants_pairs(self) -> bool {
        self != Self::Sft
    }
}

/// The loss of a pair's margin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairLoss {
    /// `-log sigmoid`; with smoothed labels conservative DPO.
    Sigmoid,
    /// With smoothed labels robust DPO, which is unbiased where so many labels are wrong.
    Robust,
}

/// What of a layer is computed again in the backward pass. The numbers are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeChoice {
    /// Whatever the memory asks for; nothing where nobody has looked.
    Auto,
    /// Nothing: fastest.
    None,
    /// Everything: a layer's activations live only while it is passed.
    Block,
}

impl From<RecomputeChoice> for Recompute {
    fn from(choice: RecomputeChoice) -> Self {
        match choice {
            RecomputeChoice::Auto | RecomputeChoice::None => Self::None,
            RecomputeChoice::Block => Self::Block,
        }
    }
}

/// How the learning rate changes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Down to 0 in a line.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

/// `loss_on` of a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossTokens {
    /// The tokens of the assistant's messages (or of the completion).
    Assistant,
    /// Every token but the first.
    All,
    /// The completion where a row names one, else every token.
    Auto,
}

/// Number format of a written model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

/// New tokens, or one file that has them: a list or a text with commas.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(transparent)]
pub struct NewTokens(pub Vec<String>);

/// Projections named by the user: `all-linear`, one name or a list.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Targets(pub Vec<String>);

impl Targets {
    /// The projections meant, in the order of the forward pass.
    ///
    /// # Errors
    /// [`TrainError::Config`] for a name that is no projection, or an empty list.
    pub fn projections(&self) -> Result<Vec<Projection>, TrainError> {
        const ALLOWED: &str = "all-linear, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
        if self.0.iter().any(|name| name == "all-linear") {
            return Ok(Projection::ALL.to_vec());
        }
        for name in &self.0 {
            require(Projection::from_name(name).is_some(), "targets", name, ALLOWED)?;
        }
        require(!self.0.is_empty(), "targets", &self.0, ALLOWED)?;
        let named = |p: &Projection| self.0.iter().any(|name| name == p.name());
        Ok(Projection::ALL.into_iter().filter(named).collect())
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        names(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for NewTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        names(deserializer).map(Self)
    }
}

/// A list of names, or one string with the names separated by commas.
fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::Many(names) => names,
        OneOrMany::One(names) => names.split(',').map(|name| name.trim().to_owned()).collect(),
    })
}

impl From<LossTokens> for LossOn {
    fn from(tokens: LossTokens) -> Self {
        match tokens {
            LossTokens::Assistant => Self::Assistant,
            LossTokens::All => Self::All,
            LossTokens::Auto => Self::Auto,
        }
    }
}

impl From<WeightDtype> for DType {
    fn from(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::F32 => Self::F32,
            WeightDtype::Bf16 => Self::BF16,
        }
    }
}
