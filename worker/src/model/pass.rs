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

impl Back<'_> {
    /// The gradient by a linear map's input, added to `onto` where there is such.
    ///
    /// # Shapes
    /// - gradient: `[N, out]`
    /// - onto, output: `[N, in]`
    #[must_use]
    pub fn through(
        &self,
        target: Target,
        linear: &Linear,
        gradient: &Tensor<2>,
        onto: Option<Tensor<2>>,
    ) -> Tensor<2> {
        let onto = linear.backward(gradient, onto);
        match self.lora.get(target) {
            None => onto,
            Some(lora) => lora.backward(gradient, onto),
        }
    }

    /// The gradients of a linear map's pair, where it has one.
    ///
    /// # Shapes
    /// - x: `[N, in]`
    /// - gradient: `[N, out]`
    pub fn learn(&mut self, target: Target, x: &Tensor<2>, gradient: &Tensor<2>) {
        let place = target as usize;
        if let (Some(lora), Some(narrow)) = (self.lora.get(target), self.narrows[place].take()) {
            self.found[place] = Some(lora.gradient(x, narrow, gradient, self.wanted));
        }
    }
}
