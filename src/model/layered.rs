//! The forward pass for training: cut between the layers, so that its backward pass holds the graph of
//! one layer at a time, and forgets each as soon as it is done with it.
//!
//! The layers are those of [`Decoder::hidden`]. Until its turn comes, a layer's graph lacks the values that
//! [`Inside`] takes and makes again. With [`Recompute::Block`] the graph is not even kept until then, but made
//! again from the layer's input (Chen et al. 2016, <https://arxiv.org/abs/1604.06174>). What a layer computes
//! depends on its input alone, masks of dropout included, so the gradients are the same bits.

use std::{ops::Range, sync::Arc};

use candle_core::{Tensor, Var, backprop::GradStore};

use super::{
    Decoder, DeltaRows, Dropout, ModelError, Step, inside::Inside, layer::LayerContext,
    step::Layout,
};
use crate::ops::{rope::Angles, seed::backward_from, values::take};

/// What a training pass computes again in its backward pass instead of keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    None,
    /// Everything inside a layer; the inputs of the layers are kept.
    Block,
}

/// A forward pass that waits for its backward pass.
pub struct LayeredPass<'a> {
    decoder: &'a Decoder,
    angles: Angles,
    sequences: Arc<[Range<usize>]>,
    deltas: Vec<DeltaRows>,
    dropout: Option<Dropout>,
    /// The embedded tokens, with the graph behind them where an embedding is trained.
    embedded: Tensor,
    layers: Vec<LayerPass>,
    /// What the last layer made, cut off.
    last: Tensor,
}

/// One layer's part.
struct LayerPass {
    /// Cut off from the layer before.
    input: Tensor,
    /// The end of the graph that begins at `input`, and what is inside, unless that is to be made again.
    graph: Option<(Tensor, Inside)>,
}

impl Decoder {
    /// The layers' pass over whole sequences; `step` has no cache.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn layered(
        &self,
        step: &Step<'_>,
        recompute: Recompute,
    ) -> Result<LayeredPass<'_>, ModelError> {
        let Layout::Whole(sequences) = step.layout()? else {
            return Err(ModelError::Step("a training pass has no cache".into()));
        };
        let embedded = self.embed(step)?;
        let mut pass = LayeredPass {
            decoder: self,
            angles: self.angles(step)?,
            sequences,
            deltas: step.deltas.to_vec(),
            dropout: step.dropout,
            last: leaf(&embedded)?,
            embedded,
            layers: Vec::with_capacity(self.layers.len()),
        };
        for index in 0..self.layers.len() {
            let input = pass.last.clone();
            let (output, inside) = pass.layer(index, &input)?;
            pass.last = leaf(&output)?;
            let mut graph = None;
            if recompute == Recompute::None && output.track_op() {
                inside.let_go()?;
                graph = Some((output, inside));
            }
            pass.layers.push(LayerPass { input, graph });
        }
        Ok(pass)
    }

    /// Hidden states after the final norm, as [`Decoder::hidden`] gives them, for a step whose gradients
    /// nobody wants although something in it is trained: no graph outlives its layer.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn hidden_untracked(&self, step: &Step<'_>) -> Result<Tensor, ModelError> {
        let (angles, layout) = (self.angles(step)?, step.layout()?);
        let (deltas, dropout) = (step.deltas, step.dropout);
        let context = LayerContext { angles: &angles, layout: &layout, deltas, dropout };
        let mut x = self.embed(step)?.detach();
        for layer in &self.layers {
            x = layer.forward(&x, &context)?.detach();
        }
        Ok(self.final_norm(&x)?.detach())
    }
}

impl LayeredPass<'_> {
    /// Hidden states after the final norm, `[tokens, hidden]`, f32: what a loss is made of.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn hidden(&self) -> Result<Tensor, ModelError> {
        self.decoder.final_norm(&self.last)
    }

    /// Goes back through the layers. `gradients` are those of a loss made of [`Self::hidden`]; those of
    /// the layers are added to them.
    ///
    /// # Errors
    /// A failed tensor operation.
    pub fn backward(mut self, mut gradients: GradStore) -> Result<GradStore, ModelError> {
        let mut next = self.last.clone();
        for index in (0..self.layers.len()).rev() {
            // Below the first trained layer nothing is tracked.
            let gradient = gradients.remove(&next).filter(|_| next.track_op());
            let Some(gradient) = gradient else { return Ok(gradients) };
            let Some(LayerPass { input, graph }) = self.layers.pop() else { break };
            let output = match graph {
                Some((output, inside)) => {
                    inside.restore(&self.decoder.layers[index])?;
                    output
                }
                None => self.layer(index, &input)?.0,
            };
            gradients.extend(backward_from(&output, gradient)?)?;
            next = input;
        }
        if let Some(gradient) = gradients.remove(&next)
            && self.embedded.track_op()
        {
            gradients.extend(backward_from(&self.embedded, gradient)?)?;
        }
        Ok(gradients)
    }

    fn layer(&self, index: usize, input: &Tensor) -> Result<(Tensor, Inside), ModelError> {
        let layout = Layout::Whole(Arc::clone(&self.sequences));
        let context = LayerContext {
            angles: &self.angles,
            layout: &layout,
            deltas: &self.deltas,
            dropout: self.dropout,
        };
        self.decoder.layers[index].forward_with_inside(input, &context)
    }
}

/// The values of `x` as the beginning of a graph of their own, where they are tracked at all. They are moved: no
/// gradient of what made `x` asks for them.
fn leaf(x: &Tensor) -> Result<Tensor, ModelError> {
    if !x.track_op() {
        return Ok(x.clone());
    }
    Ok(Var::from_vec(take(x)?, x.dims(), x.device())?.into_inner())
}
