//! The settings of `tunesmith serve`.

use std::{fmt, path::PathBuf};

use clap::builder::BoolishValueParser;
use serde::{Deserialize, Serialize};

use crate::model::{KvDtype, Quantization};
use crate::ops::lora_dtype::LoraDtype;

/// Settings of `tunesmith serve`. In a YAML file, the keys are the flags without their dashes.
#[derive(Debug, Clone, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ServeArgs {
    /// YAML file with any of these settings; environment and flags win over it
    #[arg(long, env = "TUNESMITH_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// The base model: a folder in Hub layout, or owner/name[@revision]
    #[arg(long, alias = "model-id", env = "TUNESMITH_MODEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What clients call the base model [default: the folder's name, or owner/name]
    #[arg(long, env = "TUNESMITH_SERVED_MODEL_NAME", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served_model_name: Option<String>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, env = "TUNESMITH_HOST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Port to listen on; 0 picks a free one [default: 8000]
    #[arg(long, env = "TUNESMITH_PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// An adapter to serve from the start (repeatable)
    #[arg(long, env = "TUNESMITH_ADAPTER", value_name = "NAME=DIR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapter: Vec<String>,
    /// Folder whose sub-folders are adapters, loaded when first asked for; lets clients load from it
    #[arg(long, env = "TUNESMITH_ADAPTER_DIR", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_dir: Option<PathBuf>,
    /// Further folder that clients may load adapters from (repeatable)
    #[arg(long, env = "TUNESMITH_ADAPTER_ROOT", value_name = "DIR", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapter_root: Vec<PathBuf>,
    /// Key that clients must send (repeatable)
    #[arg(long, env = "TUNESMITH_API_KEY", value_name = "KEY", hide_env_values = true)]
    #[arg(value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub api_key: Vec<String>,
    /// File with one key per line
    #[arg(long, env = "TUNESMITH_API_KEY_FILE", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// Key for whatever changes the server, and for files (repeatable) [default: any key may]
    #[arg(long, env = "TUNESMITH_ADMIN_KEY", value_name = "KEY", hide_env_values = true)]
    #[arg(value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub admin_key: Vec<String>,
    /// Serve other machines without any key
    #[arg(long, env = "TUNESMITH_INSECURE_NO_AUTH", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "true", value_parser = BoolishValueParser::new())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub insecure_no_auth: Option<bool>,
    /// Hold the base in 8 bits, or its projections in 4: less memory, faster, a little less exact. bf16:
    /// round weights and the inputs of every product to bf16, as other engines do; prompts up to twice
    /// as fast on a processor with bf16 dot products [default: none]
    #[arg(long, env = "TUNESMITH_QUANTIZE", value_name = "none|bf16|int8|int4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantization>,
    /// Requests that run at once [default: 16]
    #[arg(long, env = "TUNESMITH_MAX_NUM_SEQS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<usize>,
    /// Requests that may wait; beyond, clients get 429 [default: 256]
    #[arg(long, env = "TUNESMITH_MAX_QUEUE", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queue: Option<usize>,
    /// Longest prompt and completion together, in tokens [default: what model and memory allow]
    #[arg(long, env = "TUNESMITH_MAX_MODEL_LEN", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
    /// Tokens of one forward pass [default: 512]
    #[arg(long, env = "TUNESMITH_MAX_BATCH_TOKENS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch_tokens: Option<usize>,
    /// Memory for keys and values, as 512MiB or 2GiB [default: 1GiB]
    #[arg(long, env = "TUNESMITH_KV_CACHE_MEMORY", value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_memory: Option<String>,
    /// How keys and values are held: half the memory in bf16, about a quarter in int8, and a little less
    /// exact; in f32 what is served is bit for bit what was trained [default: f32]
    #[arg(long, env = "TUNESMITH_KV_DTYPE", value_name = "f32|bf16|int8")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_dtype: Option<KvDtype>,
    /// How adapters are held: every value as it is (`auto`: in 16 bits where that loses nothing; `float32`),
    /// or rounded while they are loaded, for less memory and speed; with `auto`, what is served is bit for
    /// bit what was trained [default: auto]
    #[arg(long, env = "TUNESMITH_LORA_DTYPE", value_name = "auto|float16|bfloat16|float32")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_dtype: Option<LoraDtype>,
    /// Tokens of prompts that may wait; beyond, clients get 429 [default: 262144]
    #[arg(long, env = "TUNESMITH_MAX_QUEUE_TOKENS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queue_tokens: Option<usize>,
    /// Milliseconds that a chunk of a long prompt may keep running answers waiting, about [default: 250]
    #[arg(long, env = "TUNESMITH_MAX_STEP_MS", value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_step_ms: Option<u64>,
    /// Most tokens to guess from the prompt and check in one pass, or `off`; answers stay the same
    /// [default: 8]
    #[arg(long, env = "TUNESMITH_SPECULATE", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculate: Option<String>,
    /// Reuse the keys and values of what requests have in common at their beginning [default: true]
    #[arg(long, env = "TUNESMITH_PREFIX_CACHE", value_parser = BoolishValueParser::new())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_cache: Option<bool>,
    /// Folder of the fine-tuning service: files, jobs and the models they make. Without it the
    /// service is off
    #[arg(long, env = "TUNESMITH_DATA_DIR", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// Fine-tuning jobs that train at once [default: 1]
    #[arg(long, env = "TUNESMITH_MAX_JOBS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_jobs: Option<usize>,
    /// Threads of each fine-tuning job [default: half of the cores, at least 1]
    #[arg(long, env = "TUNESMITH_JOB_THREADS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_threads: Option<usize>,
    /// Memory that each fine-tuning job may have, as 4GiB [default: no limit]
    #[arg(long, env = "TUNESMITH_JOB_MEMORY", value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_memory: Option<String>,
    /// Room for uploaded files, as 10GiB [default: 10GiB]
    #[arg(long, env = "TUNESMITH_FILE_QUOTA", value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_quota: Option<String>,
    /// Part of the names of fine-tuned models: ft:BASE:NAME:SUFFIX:ID [default: tunesmith]
    #[arg(long, env = "TUNESMITH_ORGANIZATION", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    /// URL that is told when a job ends; URL=whsec_SECRET signs what is sent (repeatable)
    #[arg(long, env = "TUNESMITH_WEBHOOK", value_name = "URL", hide_env_values = true)]
    #[arg(value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub webhook: Vec<String>,
    /// Let an alias move only to a model that beats the base by this metric (exact_match, f1, ...) in a
    /// paired test on the job's validation file
    #[arg(long, env = "TUNESMITH_GATE", value_name = "METRIC")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<String>,
    /// Run `python` graders: code that clients send, as this user
    #[arg(long, env = "TUNESMITH_ALLOW_PYTHON_GRADERS", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "true", value_parser = BoolishValueParser::new())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_python_graders: Option<bool>,
    /// Seconds that running requests get to finish at shutdown [default: 30]
    #[arg(long, env = "TUNESMITH_SHUTDOWN_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout: Option<u64>,
}

impl ServeArgs {
    /// The settings as one line of JSON, without the keys.
    pub(super) fn redacted(&self) -> impl fmt::Display {
        let hide = |keys: &[String]| keys.iter().map(|_| "***".to_owned()).collect();
        let shown = Self {
            api_key: hide(&self.api_key),
            admin_key: hide(&self.admin_key),
            webhook: hide(&self.webhook),
            ..self.clone()
        };
        serde_json::to_string(&shown).unwrap_or_default()
    }
}
