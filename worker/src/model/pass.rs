//! One layer's linear maps on the way there and on the way back: what is kept in between, and which
//! gradients come out.

use std::borrow::Cow;

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use cairn_stack::config::Target;

use super::linear::Linear;
use super::lora::{Factors, Gradient, LayerFactors, Wanted};

/// Tokens that a pass is about.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// All of them.
    All,
    /// Those before a scored one, `[S]`: above the last block's attention nothing reads any other.
    Predictors(&'a Tensor<1, Int>),
}

impl Tokens<'_> {
    /// Their rows, of `[N, width]`.
    #[must_use]
    pub fn of(self, x: &Tensor<2>) -> Tensor<2> {
        match self {
            Self::All => x.clone(),
            Self::Predictors(places) => x.clone().select(0, places.clone()),
        }
    }

    /// The gradient of [`Self::of`]: their rows among `count`, zeros in all others.
    #[must_use]
    pub fn among(self, count: usize, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::All => x,
            // Every scored token has a predictor of its own.
            Self::Predictors(places) => Tensor::zeros([count, x.dims()[1]], &x.device())
                .select_assign(0, places.clone(), x, IndexingUpdateOp::Add),
        }
    }

    /// A pair as these tokens see it.
    fn pair(self, lora: LayerFactors<'_>, target: Target) -> Option<Cow<'_, Factors>> {
        let pair = lora.get(target)?;
        Some(match (self, &pair.dropout) {
            (Self::Predictors(_), Some(mask)) => Cow::Owned(Factors {
                dropout: Some(self.of(mask)),
                ..pair.clone()
            }),
            _ => Cow::Borrowed(pair),
        })
    }
}

/// What the pairs' A made of their inputs, `[N, r]` each.
pub type Narrows = [Option<Tensor<2>>; Target::ALL.len()];

/// The gradients of one layer's pairs.
pub type LayerGradients = [Option<Gradient>; Target::ALL.len()];

/// The way there through one layer.
pub struct There<'a> {
    /// The layer's pairs.
    pub lora: LayerFactors<'a>,
    /// Tokens that are passed from here on.
    pub tokens: Tokens<'a>,
    /// What is kept of them.
    pub narrows: Narrows,
}

impl<'a> There<'a> {
    /// At the layer's beginning.
    #[must_use]
    pub fn new(lora: LayerFactors<'a>) -> Self {
        Self {
            lora,
            tokens: Tokens::All,
            narrows: Narrows::default(),
        }
    }

    /// A linear map with its pair, added to `onto` where there is such.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - onto, output: `[N, out]`
    pub fn project(
        &mut self,
        target: Target,
        linear: &Linear,
        x: &Tensor<2>,
        onto: Option<Tensor<2>>,
    ) -> Tensor<2> {
        let y = linear.forward(x, onto);
        let Some(lora) = self.tokens.pair(self.lora, target) else {
            return y;
        };
        let (y, narrow) = lora.forward(x, y);
        self.narrows[target as usize] = Some(narrow);
        y
    }
}

/// The way back through one layer.
pub struct Back<'a> {
    /// The layer's pairs.
    pub lora: LayerFactors<'a>,
    /// Tokens that are passed down to here.
    pub tokens: Tokens<'a>,
    /// What was kept of them.
    pub narrows: Narrows,
    /// Which gradients are wanted.
    pub wanted: Wanted,
    /// The gradients so far.
    pub found: LayerGradients,
}

/// What comes back to the output of a linear map.
pub struct Arrived<'g> {
    target: Target,
    /// The gradient, `[N, out]`.
    gradient: &'g Tensor<2>,
    /// What the pair's B makes of it, where there is a pair: the input and A both need it.
    narrowed: Option<Tensor<2>>,
}

impl Back<'_> {
    /// At a linear map's output.
    ///
    /// # Shapes
    /// - gradient: `[N, out]`
    #[must_use]
    pub fn at<'g>(&self, target: Target, gradient: &'g Tensor<2>) -> Arrived<'g> {
        Arrived {
            target,
            gradient,
            narrowed: self.lora.get(target).map(|pair| pair.narrowed(gradient)),
        }
    }

    /// The gradient by the linear map's input, added to `onto` where there is such.
    ///
    /// # Shapes
    /// - onto, output: `[N, in]`
    #[must_use]
    pub fn through(
        &self,
        arrived: &Arrived<'_>,
        linear: &Linear,
        onto: Option<Tensor<2>>,
    ) -> Tensor<2> {
        let onto = linear.backward(arrived.gradient, onto);
        let pair = self.tokens.pair(self.lora, arrived.target);
        match (pair, &arrived.narrowed) {
            (Some(pair), Some(narrowed)) => pair.backward(arrived.gradient, narrowed, onto),
            _ => onto,
        }
    }

    /// The gradients of the linear map's pair, where it has one.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    pub fn learn(&mut self, arrived: Arrived<'_>, x: &Tensor<2>) {
        let place = arrived.target as usize;
        if let (Some(lora), Some(narrow), Some(narrowed)) = (
            self.tokens.pair(self.lora, arrived.target),
            self.narrows[place].take(),
            arrived.narrowed,
        ) {
            let pair = lora.gradient(x, narrow, arrived.gradient, narrowed, self.wanted);
            self.found[place] = Some(pair);
        }
    }
}
