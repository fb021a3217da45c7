//! Why an adapter is refused: one variant per reason, each with the datum that shows it.

use std::{fmt::Write, io, path::PathBuf};

use crate::publish::DiskError;

/// Tensor names listed in a message before it says "and N more".
const LISTED_TENSORS: usize = 8;

/// Why an adapter cannot be made, read, written or published.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file or folder that an adapter needs is not there.
    #[error("no such file or folder: {}", path.display())]
    NotFound {
        /// What is missing.
        path: PathBuf,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Writing failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The weights are a Python pickle, which can run any program when it is opened.
    #[error(
        "{} is a Python pickle, which can run code when opened and is never read; if you trust it, \
         convert it with `PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)` in \
         Python, which writes adapter_model.safetensors",
        path.display()
    )]
    Pickle {
        /// The pickle.
        path: PathBuf,
    },
    /// A JSON file does not parse, or a field has a value that it cannot have.
    #[error("{}: {detail}", path.display())]
    MalformedConfig {
        /// The JSON file.
        path: PathBuf,
        /// The field and its value, or the parser's message.
        detail: String,
    },
    /// A field asks for something that changes the forward pass and is not implemented.
    #[error("adapter_config.json: `{field}` = {value} is not supported")]
    UnsupportedField {
        /// The field's name.
        field: String,
        /// Its value as JSON.
        value: String,
    },
    /// `target_modules` names something that this model has no adapter for.
    #[error(
        "adapter_config.json: target module `{target}` matches no linear layer of the model that \
         an adapter can change"
    )]
    UnsupportedTarget {
        /// The entry of `target_modules`.
        target: String,
    },
    /// The tensor file is truncated or not in the safetensors format.
    #[error("{}: {detail}", path.display())]
    MalformedFile {
        /// The tensor file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The file has two tensors of one name.
    #[error("tensor `{tensor}` is in the file twice")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// Tensors that no targeted module uses.
    #[error("no targeted module uses {}", list(tensors))]
    UnmatchedTensor {
        /// Their names, sorted.
        tensors: Vec<String>,
    },
    /// Targeted modules lack these tensors.
    #[error("missing {}", list(tensors))]
    MissingTensor {
        /// Their names, sorted.
        tensors: Vec<String>,
    },
    /// A tensor's shape does not fit the model or the configured rank.
    #[error("tensor `{tensor}` has shape {found:?}, expected {expected:?}")]
    WrongShape {
        /// The tensor.
        tensor: String,
        /// What model and rank ask for.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A tensor is neither f32 nor f16 nor bf16.
    #[error("tensor `{tensor}` has dtype {dtype}, expected f32, f16 or bf16")]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// The file's name for its dtype.
        dtype: String,
    },
    /// A tensor holds NaN or an infinity.
    #[error("tensor `{tensor}` holds {value} at element {index}")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Flat index of the first such element.
        index: usize,
        /// The element.
        value: f32,
    },
    /// A value is too large for the dtype that adapters are to be held in.
    #[error("tensor `{tensor}` holds {value}, which is too large for --lora-dtype {dtype}")]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
        /// The dtype's name.
        dtype: &'static str,
    },
    /// The adapter's card says that it was made for another base model.
    #[error("made for the base model with fingerprint {found}, not for this one, {expected}")]
    WrongBase {
        /// Fingerprint of the model in memory.
        expected: String,
        /// Fingerprint in the card.
        found: String,
    },
    /// A file, or its header, is larger than the limit.
    #[error("{}: {what} has {bytes} bytes, the limit is {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// "the file" or "the header".
        what: &'static str,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A rank is larger than the limit.
    #[error("rank {rank} of `{module}` is above the limit of {limit}")]
    RankTooLarge {
        /// The module.
        module: String,
        /// Its rank.
        rank: usize,
        /// The limit.
        limit: usize,
    },
    /// A fresh adapter was asked for with a setting that it cannot have.
    #[error("{field} = {value}: {expected}")]
    InvalidSetting {
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// An adapter is to be trained on in a way that it was not made for.
    #[error("the adapter to go on from has {field} {has}, but {wants} is asked for")]
    OtherSetting {
        /// The setting.
        field: &'static str,
        /// The adapter's value.
        has: String,
        /// The value that is asked for.
        wants: String,
    },
    /// The name cannot be given to an adapter.
    #[error("adapter name {name:?}: {expected}")]
    InvalidName {
        /// The name.
        name: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// The name is taken and the caller did not ask to replace. Clients compare this text.
    #[error(
        "The lora adapter '{name}' has already been loaded. If you want to load the adapter in \
         place, set 'load_inplace' to True."
    )]
    AlreadyLoaded {
        /// The name.
        name: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl AdapterError {
    /// The reason as a machine reads it; part of the HTTP interface, so never renamed.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Io { .. } | Self::Disk(_) => "io",
            Self::Pickle { .. } => "pickle",
            Self::MalformedConfig { .. } => "malformed_config",
            Self::UnsupportedField { .. } => "unsupported_field",
            Self::UnsupportedTarget { .. } => "unsupported_target",
            Self::MalformedFile { .. } => "malformed_file",
            Self::DuplicateTensor { .. } => "duplicate_tensor",
            Self::UnmatchedTensor { .. } => "unmatched_tensor",
            Self::MissingTensor { .. } => "missing_tensor",
            Self::WrongShape { .. } => "wrong_shape",
            Self::WrongDtype { .. } => "wrong_dtype",
            Self::NotFinite { .. } => "not_finite",
            Self::OutOfRange { .. } => "out_of_range",
            Self::WrongBase { .. } => "wrong_base",
            Self::TooLarge { .. } => "too_large",
            Self::RankTooLarge { .. } => "rank_too_large",
            Self::InvalidSetting { .. } => "invalid_setting",
            Self::OtherSetting { .. } => "other_setting",
            Self::InvalidName { .. } => "invalid_name",
            Self::AlreadyLoaded { .. } => "already_loaded",
            Self::Candle(_) => "internal",
        }
    }
}

fn list(tensors: &[String]) -> String {
    let shown: Vec<String> =
        tensors.iter().take(LISTED_TENSORS).map(|name| format!("`{name}`")).collect();
    let mut text = shown.join(", ");
    if tensors.len() > LISTED_TENSORS {
        let _ = write!(text, " and {} more", tensors.len() - LISTED_TENSORS);
    }
    text
}
