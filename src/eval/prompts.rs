//! The prompt that each arm sends for each question, as the server would build it, and the tokens
//! of the reference answer after it.

use std::sync::Arc;

use serde_json::{Map, json};

use super::{Arm, EvalError};
use crate::adapters::AdapterVersion;
use crate::data::{Question, Row, choose_examples, few_shot};
use crate::text::{ChatTemplate, TextError, Tokenizer};

/// A question in tokens.
pub(super) struct Prompt {
    /// What the model is given.
    pub(super) tokens: Vec<u32>,
    /// The reference answer after it, with the token that ends it.
    pub(super) reference: Vec<u32>,
}

/// What prompts are made with.
pub(super) struct Prompts<'a> {
    /// The base model's.
    pub(super) tokenizer: &'a Arc<Tokenizer>,
    pub(super) template: &'a ChatTemplate,
    pub(super) stop_token_ids: &'a [u32],
    pub(super) seed: u64,
    /// Those of the arms, each of which may have a tokenizer of its own.
    pub(super) adapters: &'a [Option<Arc<AdapterVersion>>],
}

impl Prompts<'_> {
    /// The prompts of all arms, `[arm][row]`. Few-shot arms show the same rows of `examples` before
    /// every question.
    pub(super) fn of_arms(
        &self,
        arms: &[Arm],
        questions: &[Question],
        examples: &[Row],
    ) -> Result<Vec<Vec<Prompt>>, EvalError> {
        let mut prompts = Vec::with_capacity(arms.len());
        for (arm, adapter) in arms.iter().zip(self.adapters) {
            let tokenizer = AdapterVersion::tokenizer_of(adapter.as_ref(), self.tokenizer);
            let failed = |question: &Question, source| EvalError::Prompt {
                line: question.line,
                arm: arm.to_string(),
                source,
            };
            let shown = match arm {
                Arm::FewShot(k) => few_shot(questions, &self.choose(examples, *k)?),
                Arm::Base | Arm::Tuned(_) => questions.to_vec(),
            };
            let of_arm: Result<Vec<Prompt>, EvalError> = (shown.iter())
                .map(|question| {
                    self.prompt(question, tokenizer).map_err(|source| failed(question, source))
                })
                .collect();
            prompts.push(of_arm?);
        }
        Ok(prompts)
    }

    fn choose(&self, examples: &[Row], k: usize) -> Result<Vec<Question>, EvalError> {
        let chosen = choose_examples(examples, k, self.seed);
        if chosen.len() < k {
            return Err(EvalError::FewShot { wanted: k, available: chosen.len() });
        }
        Ok(chosen)
    }

    fn prompt(&self, question: &Question, tokenizer: &Tokenizer) -> Result<Prompt, TextError> {
        let tokens = question.prompt_tokens(tokenizer, self.template)?;
        let rest = match &question.raw_prompt {
            Some(_) => question.answer.clone() + tokenizer.eos_token().unwrap_or_default(),
            None => self.rendered_answer(question)?,
        };
        // Tokenised by itself, as in training: the answer continues the prompt's tokens.
        let mut reference = tokenizer.encode(&rest, false)?;
        // What a template writes after the end of the turn is no part of the answer.
        let end = reference.iter().position(|token| self.stop_token_ids.contains(token));
        reference.truncate(end.map_or(reference.len(), |end| end + 1));
        Ok(Prompt { tokens, reference })
    }

    /// What the template renders after the generation prompt; the bare answer where it renders the
    /// turn in another way.
    fn rendered_answer(&self, question: &Question) -> Result<String, TextError> {
        let (tools, extra) = (question.tools.as_deref(), Map::new());
        let mut messages = question.messages.clone();
        let prompt = self.template.render(&messages, tools, true, &extra)?;
        messages.push(json!({"role": "assistant", "content": question.answer}));
        let whole = self.template.render(&messages, tools, false, &extra)?;
        Ok(match whole.strip_prefix(&prompt) {
            Some(rest) => rest.to_owned(),
            None => question.answer.clone() + self.tokenizer.eos_token().unwrap_or_default(),
        })
    }
}
