//! One layer's linear maps on the way there and on the way back: what is kept in between, and which
//! gradients come out.

use burn::tensor::Tensor;

use cairn_stack::config::Target;

use super::linear::Linear;
use super::lora::{Gradient, LayerFactors, Wanted};

/// What the pairs' A made of their inputs, `[N, r]` each.
pub type Narrows = [Option<Tensor<2>>; Target::ALL.len()];

/// The gradients of one layer's pairs.
pub type LayerGradients = [Option<Gradient>; Target::ALL.len()];

/// The way there through one layer.
pub struct There<'a> {
    /// The layer's pairs.
    pub lora: LayerFactors<'a>,
    /// What is kept of them.
    pub narrows: Narrows,
}

impl<'a> There<'a> {
    /// At the layer's beginning.
    #[must_use]
    pub fn new(lora: LayerFactors<'a>) -> Self {
        Self {
            lora,
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
        let Some(lora) = self.lora.get(target) else {
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
            narrowed: self.lora.get(target).map(|lora| lora.narrowed(gradient)),
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
        match (self.lora.get(arrived.target), &arrived.narrowed) {
            (Some(lora), Some(narrowed)) => lora.backward(arrived.gradient, narrowed, onto),
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
            self.lora.get(arrived.target),
            self.narrows[place].take(),
            arrived.narrowed,
        ) {
            let pair = lora.gradient(x, narrow, arrived.gradient, narrowed, self.wanted);
            self.found[place] = Some(pair);
        }
    }
}
