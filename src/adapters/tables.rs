//! The embedding and the head of an adapter: trained whole (PEFT's `modules_to_save`), or the rows of
//! some tokens (`trainable_token_indices`), which is how new tokens are learned.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor, Var};
use serde_json::{Map, Value, json};

use super::{AdapterError, LoraConfig};
use crate::model::{Decoder, ModelConfig, OwnTable, Table};
use crate::ops::{
    embedding::embedding,
    own_rows::replace_rows,
    weight::{Precision, Weight},
};

/// Modules by their name in PEFT.
const NAMES: [(Table, &str, &str); 2] =
    [(Table::Embedding, "embed_tokens", "model.embed_tokens"), (Table::Head, "lm_head", "lm_head")];

/// What is trained of a table.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Share {
    Whole,
    Rows(Arc<[u32]>),
    /// The head of a base that has one matrix for both, where the embedding is trained whole and the head is
    /// to stay the embedding (PEFT's `ensure_weight_tying`). The file has the matrix under both names.
    Tied,
}

/// What is trained of each table.
pub(super) type Shares = BTreeMap<Table, Share>;

/// The tables that an adapter has of its own.
#[derive(Default)]
pub(super) struct Tables {
    own: BTreeMap<Table, OwnTable>,
    /// The head is the embedding, so it has the embedding's rows.
    head_follows: bool,
    /// And the whole of it.
    is_tied: bool,
}

impl Tables {
    /// Tables of `tensors`, which are by name what `shares` asks for. Variables if `variables` are
    /// wanted, which then get them by name.
    pub(super) fn new(
        shares: &Shares,
        model: &ModelConfig,
        mut tensors: BTreeMap<String, Tensor>,
        mut variables: Option<&mut Vec<(String, Var)>>,
    ) -> Result<Self, AdapterError> {
        let mut own = BTreeMap::new();
        for (table, share) in shares {
            let name = tensor_name(*table, share);
            let expected = shape(share, model);
            let Some(mut tensor) = tensors.remove(&name) else {
                return Err(AdapterError::MissingTensor { tensors: vec![name] });
            };
            if tensor.dims() != expected {
                let (expected, found) = (expected.to_vec(), tensor.dims().to_vec());
                return Err(AdapterError::WrongShape { tensor: name, expected, found });
            }
            if *share == Share::Tied {
                let embedding: Option<&OwnTable> = own.get(&Table::Embedding);
                if !embedding.is_some_and(|own| is_tensor(own, &tensor)) {
                    return Err(AdapterError::UnsupportedField {
                        field: "ensure_weight_tying".to_owned(),
                        value: format!("true beside a `{name}` of its own"),
                    });
                }
                continue;
            }
            if let Some(variables) = &mut variables {
                let variable = Var::from_tensor(&tensor)?;
                tensor = variable.as_tensor().clone();
                variables.push((name, variable));
            }
            let table_of_own = match share {
                Share::Rows(ids) => OwnTable::Rows { ids: Arc::clone(ids), values: tensor },
                Share::Whole if variables.is_some() => OwnTable::Whole(Weight::Plain(tensor)),
                Share::Whole | Share::Tied => {
                    OwnTable::Whole(Weight::pack_tensor(Precision::Exact, &tensor)?)
                }
            };
            own.insert(*table, table_of_own);
        }
        let is_tied = shares.get(&Table::Head) == Some(&Share::Tied);
        Ok(Self { own, head_follows: model.tie_word_embeddings, is_tied })
    }

    /// What stands in place of `table`.
    pub(super) fn get(&self, table: Table) -> Option<&OwnTable> {
        let follows = |own: &OwnTable| {
            table == Table::Head && self.head_follows && (is_rows(own) || self.is_tied)
        };
        let embedding = self.own.get(&Table::Embedding).filter(|own| follows(own));
        self.own.get(&table).or(embedding)
    }

    /// Whether the head is another matrix than the embedding although the base has one for both.
    pub(super) fn unties(&self) -> bool {
        let whole = self.own.values().any(|own| !is_rows(own));
        self.head_follows && !self.is_tied && (whole || self.own.contains_key(&Table::Head))
    }

    /// Whether embedding and head are one matrix that is trained whole.
    pub(super) fn is_tied(&self) -> bool {
        self.is_tied
    }

    /// The tensors by their names in the file, f32.
    pub(super) fn named(&self) -> Result<Vec<(String, Tensor)>, AdapterError> {
        let mut named = Vec::new();
        for (table, own) in &self.own {
            named.push(match own {
                OwnTable::Whole(weight) => (tensor_name(*table, &Share::Whole), plain(weight)?),
                OwnTable::Rows { ids, values } => {
                    (tensor_name(*table, &Share::Rows(Arc::clone(ids))), values.clone())
                }
            });
        }
        if self.is_tied
            && let Some(OwnTable::Whole(weight)) = self.own.get(&Table::Embedding)
        {
            named.push((tensor_name(Table::Head, &Share::Tied), plain(weight)?));
        }
        Ok(named)
    }

    /// `trainable_token_indices`, `modules_to_save` and `ensure_weight_tying` of adapter_config.json.
    pub(super) fn peft_fields(&self) -> [(&'static str, Value); 3] {
        let mut rows = Map::new();
        let mut whole = Vec::new();
        for (table, own) in &self.own {
            match own {
                OwnTable::Rows { ids, .. } => {
                    rows.insert(short_name(*table).to_owned(), json!(ids.to_vec()));
                }
                OwnTable::Whole(_) => whole.push(short_name(*table)),
            }
        }
        let null_if = |empty: bool, value| if empty { Value::Null } else { value };
        [
            ("trainable_token_indices", null_if(rows.is_empty(), Value::Object(rows))),
            ("modules_to_save", null_if(whole.is_empty(), json!(whole))),
            ("ensure_weight_tying", json!(self.is_tied)),
        ]
    }

    /// Puts the own tables and rows into the base's `weights`, in the dtype that they have there.
    pub(super) fn merge(&self, weights: &mut Vec<(String, Tensor)>) -> Result<(), AdapterError> {
        let find = |weights: &[(String, Tensor)], table| {
            let name = weight_name(table);
            weights.iter().position(|(other, _)| *other == name)
        };
        let Some(embedding) = find(weights, Table::Embedding) else { return Ok(()) };
        if self.unties() && find(weights, Table::Head).is_none() {
            let head = weights[embedding].1.clone();
            weights.push((weight_name(Table::Head), head));
        }
        for table in [Table::Embedding, Table::Head] {
            let (Some(own), Some(at)) = (self.get(table), find(weights, table)) else { continue };
            let base = &weights[at].1;
            let merged = match own {
                OwnTable::Whole(weight) => plain(weight)?.to_dtype(base.dtype())?,
                OwnTable::Rows { ids, values } => {
                    let places = ids.iter().enumerate();
                    let places = places.map(|(from, id)| (*id as usize, from)).collect();
                    let base_values = base.to_dtype(DType::F32)?;
                    replace_rows(&base_values, &values.detach(), places)?.to_dtype(base.dtype())?
                }
            };
            weights[at].1 = merged;
        }
        weights.sort_by(|(left, _), (right, _)| left.cmp(right));
        Ok(())
    }

    pub(super) fn num_parameters(&self) -> usize {
        let count = |own: &OwnTable| match own {
            OwnTable::Whole(weight) => weight.elem_count(),
            OwnTable::Rows { values, .. } => values.elem_count(),
        };
        self.own.values().map(count).sum()
    }

    /// The tokens whose rows are the adapter's, and the tables that it has whole, as text; "none" if there
    /// are none.
    pub(super) fn described(&self) -> [String; 2] {
        let (mut rows, mut whole) = (BTreeSet::new(), Vec::new());
        for (table, own) in &self.own {
            match own {
                OwnTable::Rows { ids, .. } => rows.extend(ids.iter()),
                OwnTable::Whole(_) => whole.push(short_name(*table).to_owned()),
            }
        }
        let rows: Vec<String> = rows.into_iter().map(ToString::to_string).collect();
        [rows, whole]
            .map(|names| if names.is_empty() { "none".to_owned() } else { names.join(", ") })
    }
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.described()).finish()
    }
}

/// The table that a name of PEFT's stands for.
pub(super) fn table_named(name: &str) -> Option<Table> {
    let ends = |path: &str| {
        path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
    };
    NAMES.iter().find(|(_, _, path)| ends(path)).map(|(table, ..)| *table)
}

/// Names of the tensors that `shares` asks for.
pub(super) fn tensor_names(shares: &Shares) -> BTreeSet<String> {
    shares.iter().map(|(table, share)| tensor_name(*table, share)).collect()
}

/// What a fresh adapter starts with: the base's own values, or means of them.
pub(super) fn start(
    shares: &Shares,
    token_starts: &BTreeMap<u32, Vec<u32>>,
    decoder: &Decoder,
) -> Result<BTreeMap<String, Tensor>, AdapterError> {
    let mut tensors = BTreeMap::new();
    for (table, share) in shares {
        let base = decoder.table(*table);
        let tensor = match share {
            Share::Whole | Share::Tied => plain(base)?,
            Share::Rows(ids) => {
                let rows =
                    ids.iter().map(|id| match token_starts.get(id).filter(|p| !p.is_empty()) {
                        Some(pieces) => embedding(base, pieces)?.detach().mean_keepdim(0),
                        None => Ok(embedding(base, &[*id])?.detach()),
                    });
                Tensor::cat(&rows.collect::<Result<Vec<_>, _>>()?, 0)?
            }
        };
        tensors.insert(tensor_name(*table, share), tensor);
    }
    Ok(tensors)
}

/// Where `shares` have a table whole and the base has one matrix for both, that stays one, whichever of the
/// two was named: `ensure_weight_tying`.
pub(super) fn tie(shares: &mut Shares, model: &ModelConfig) {
    if model.tie_word_embeddings && shares.values().any(|share| *share == Share::Whole) {
        *shares = [(Table::Embedding, Share::Whole), (Table::Head, Share::Tied)].into();
    }
}

/// What settings ask for: whole tables by name, and rows of the embedding and, where it is another
/// matrix, of the head.
pub(super) fn wanted(config: &LoraConfig, model: &ModelConfig) -> Result<Shares, AdapterError> {
    let LoraConfig { modules_to_save, token_ids, ensure_weight_tying, .. } = config;
    let mut shares = Shares::new();
    for name in modules_to_save {
        let Some(table) = table_named(name) else {
            return Err(AdapterError::InvalidSetting {
                field: "modules_to_save",
                value: name.clone(),
                expected: "embed_tokens or lm_head",
            });
        };
        shares.insert(table, Share::Whole);
    }
    if *ensure_weight_tying {
        tie(&mut shares, model);
    }
    if !token_ids.is_empty() {
        let ids: Arc<[u32]> = BTreeSet::from_iter(token_ids.iter().copied()).into_iter().collect();
        // A tied head has the embedding's rows; one that is trained whole would have to be both.
        let head = (!model.tie_word_embeddings || shares.contains_key(&Table::Head))
            .then_some(Table::Head);
        for table in [Some(Table::Embedding), head].into_iter().flatten() {
            if shares.insert(table, Share::Rows(Arc::clone(&ids))).is_some() {
                return Err(AdapterError::InvalidSetting {
                    field: "modules_to_save",
                    value: short_name(table).to_owned(),
                    expected: "no table of which single rows are trained as well",
                });
            }
        }
    }
    Ok(shares)
}

fn short_name(table: Table) -> &'static str {
    NAMES.iter().find(|(known, ..)| *known == table).map_or("", |(_, name, _)| name)
}

/// The table's name in a checkpoint.
fn weight_name(table: Table) -> String {
    format!("{}.weight", path(table))
}

fn path(table: Table) -> &'static str {
    NAMES.iter().find(|(known, ..)| *known == table).map_or("", |(.., path)| path)
}

fn tensor_name(table: Table, share: &Share) -> String {
    let path = path(table);
    let tensor = match share {
        Share::Whole | Share::Tied => "weight",
        Share::Rows(_) => "token_adapter.trainable_tokens_delta",
    };
    format!("base_model.model.{path}.{tensor}")
}

pub(super) fn shape(share: &Share, model: &ModelConfig) -> [usize; 2] {
    match share {
        Share::Whole | Share::Tied => [model.vocab_size, model.hidden_size],
        Share::Rows(ids) => [ids.len(), model.hidden_size],
    }
}

/// Whether `own` is this table, number by number.
fn is_tensor(own: &OwnTable, tensor: &Tensor) -> bool {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let OwnTable::Whole(weight) = own else { return false };
    let own = plain(weight).and_then(|own| values(&own));
    own.is_ok_and(|own| values(tensor).is_ok_and(|other| other == own))
}

fn is_rows(own: &OwnTable) -> bool {
    matches!(own, OwnTable::Rows { .. })
}

fn plain(weight: &Weight) -> candle_core::Result<Tensor> {
    weight.to_tensor()?.to_dtype(DType::F32)?.to_device(&Device::Cpu)
}
