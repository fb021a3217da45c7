//! Embedding and head, with the tables of adapters in place of the base's where they have their own.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::{DeltaRows, ModelError, OwnTable, Table};
use crate::ops::{
    cross_entropy::capped_cross_entropy,
    embedding::embedding,
    linear::linear,
    own_rows::{self, put_columns, replace_rows},
    weight::Weight,
};

/// The rows of `tokens`, `[tokens, hidden]`.
pub(super) fn embed(
    base: &Weight,
    tokens: &[u32],
    deltas: &[DeltaRows],
) -> Result<Tensor, ModelError> {
    let mut x: Option<Tensor> = None;
    for DeltaRows { rows, delta } in deltas {
        let Some(own) = delta.table(Table::Embedding) else { continue };
        x = Some(match own {
            // No row needs the base's table.
            OwnTable::Whole(table) if *rows == (0..tokens.len()) => embedding(table, tokens)?,
            OwnTable::Whole(table) => {
                let own = embedding(table, &tokens[rows.clone()])?;
                with_rows(&x.map_or_else(|| embedding(base, tokens), Ok)?, own, rows)?
            }
            OwnTable::Rows { ids, values } => {
                let own = |row: usize| ids.iter().position(|id| *id == tokens[row]);
                let places = rows.clone().filter_map(|row| Some((row, own(row)?))).collect();
                let x = x.map_or_else(|| embedding(base, tokens), Ok)?;
                replace_rows(&x, values, places)?
            }
        });
    }
    Ok(x.map_or_else(|| embedding(base, tokens), Ok)?)
}

/// Logits of `hidden [n, hidden]`, which are the step's rows `rows`: `[n, vocab]`.
pub(super) fn logits(
    base: &Weight,
    hidden: &Tensor,
    rows: &[u32],
    deltas: &[DeltaRows],
) -> Result<Tensor, ModelError> {
    let groups = groups(base, rows, deltas);
    let logits = in_groups(hidden, &groups, 0, |hidden, _, group| {
        let logits = linear(hidden, group.head, None)?;
        if let Some(OwnTable::Rows { ids, values }) = group.own {
            let own = linear(hidden, &values.clone().into(), None)?;
            put_columns(&logits, &own, (0..hidden.dim(0)?).collect(), ids)?;
        }
        Ok(logits)
    })?;
    Ok(logits)
}

/// Losses of `hidden [n, hidden]`, which are the step's rows `rows`, against `targets`: `[2, n]`. A soft
/// cap bends the logits first.
pub(super) fn losses(
    base: &Weight,
    (hidden, soft_cap): (&Tensor, Option<f64>),
    (rows, targets): (&[u32], &[u32]),
    deltas: &[DeltaRows],
) -> Result<Tensor, ModelError> {
    let groups = groups(base, rows, deltas);
    in_groups(hidden, &groups, 1, |hidden, places, group| {
        let targets: Vec<u32> = places.iter().map(|place| targets[*place as usize]).collect();
        Ok(match group.own {
            Some(OwnTable::Rows { ids, values }) => {
                own_rows::cross_entropy(hidden, group.head, (ids, values), (&targets, soft_cap))?
            }
            Some(OwnTable::Whole(_)) | None => {
                capped_cross_entropy(hidden, group.head, &targets, soft_cap)?
            }
        })
    })
}

/// Rows that share a head.
struct Group<'a> {
    head: &'a Weight,
    own: Option<&'a OwnTable>,
    /// Their places among the rows.
    places: Vec<u32>,
}

/// `rows` by their heads; those of the base come first.
fn groups<'a>(base: &'a Weight, rows: &[u32], deltas: &'a [DeltaRows]) -> Vec<Group<'a>> {
    let mut groups = vec![Group { head: base, own: None, places: Vec::new() }];
    let mut group_of = vec![0; rows.len()];
    for DeltaRows { rows: own_rows, delta } in deltas {
        let Some(own) = delta.table(Table::Head) else { continue };
        for (group, row) in group_of.iter_mut().zip(rows) {
            if own_rows.contains(&(*row as usize)) {
                *group = groups.len();
            }
        }
        let head = if let OwnTable::Whole(head) = own { head } else { base };
        groups.push(Group { head, own: Some(own), places: Vec::new() });
    }
    for (place, group) in (0..).zip(group_of) {
        groups[group].places.push(place);
    }
    if groups.iter().any(|group| !group.places.is_empty()) {
        groups.retain(|group| !group.places.is_empty());
    } else {
        groups.truncate(1);
    }
    groups
}

/// What `body` makes of each group's rows of `hidden`, put together along `dim` in the rows' order.
fn in_groups(
    hidden: &Tensor,
    groups: &[Group<'_>],
    dim: usize,
    body: impl Fn(&Tensor, &[u32], &Group<'_>) -> Result<Tensor, ModelError>,
) -> Result<Tensor, ModelError> {
    if let [only] = groups {
        return body(hidden, &only.places, only);
    }
    let mut parts = Vec::with_capacity(groups.len());
    let mut order: Vec<u32> = Vec::new();
    for group in groups {
        let places = Tensor::from_slice(&group.places, group.places.len(), &Device::Cpu)?;
        parts.push(body(&hidden.index_select(&places, 0)?, &group.places, group)?);
        order.extend(&group.places);
    }
    // Where each row has come to.
    let mut back = vec![0_u32; order.len()];
    for (at, place) in (0..).zip(&order) {
        back[*place as usize] = at;
    }
    let back = Tensor::from_slice(&back, back.len(), &Device::Cpu)?;
    Ok(Tensor::cat(&parts, dim)?.index_select(&back, dim)?)
}

/// `x` with `own` in place of its `rows`; keeps the graph.
fn with_rows(x: &Tensor, own: Tensor, rows: &Range<usize>) -> Result<Tensor, ModelError> {
    let after = x.dim(0)? - rows.end;
    let mut parts = Vec::with_capacity(3);
    if rows.start > 0 {
        parts.push(x.narrow(0, 0, rows.start)?);
    }
    parts.push(own);
    if after > 0 {
        parts.push(x.narrow(0, rows.end, after)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}
