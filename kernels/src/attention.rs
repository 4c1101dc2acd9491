//! Causal attention of packed documents, never with more than a few rows of scores at a time
//! (FlashAttention, arXiv 2205.14135: the softmax is formed again on the way back).

use rayon::prelude::*;

use crate::lanes::{exp, exponentials, largest, rows_a_piece, sum2, vectorised};
use crate::product::{Into, Matrix, Threads, product};

/// Queries at a time: their scores stay in the second-level cache for sequences of a usual length,
/// and a product of as many rows runs near full speed.
const QUERIES: usize = 64;

/// The shape of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Tokens a row, `L`.
    pub length: usize,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key-value heads, `K`; each serves `H / K` query heads.
    pub kv_heads: usize,
    /// Width of a head, `E`.
    pub width: usize,
}

impl Shape {
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Values of one head.
    fn head(self) -> usize {
        self.length * self.width
    }

    /// What the tokens of one row see first.
    fn first(self, first: &[u32], row: usize) -> &[u32] {
        let start = row * self.length % first.len();
        &first[start..][..self.length]
    }
}

/// `softmax(q kᵀ) v`, token `i` of a row seeing tokens `first[i]..=i`.
///
/// # Shapes
/// - q, out: `[R, H, L, E]`
/// - k, v: `[R, K, L, E]`
/// - first: `[N]`, or `[L]` where all rows are alike; never falling within a row
/// - log_sums: `[R, H, L]`: the logarithm of every softmax's denominator, for the way back
pub fn attention(
    shape: Shape,
    (q, k, v): (&[f32], &[f32], &[f32]),
    first: &[u32],
    out: &mut [f32],
    log_sums: &mut [f32],
) {
    let (head, width) = (shape.head(), shape.width);
    assert!(q.len() == out.len() && k.len() == v.len());
    assert_eq!(k.len() * shape.group(), q.len());
    assert_eq!(log_sums.len() * width, q.len());
    let pieces = q.par_chunks(head).zip(out.par_chunks_mut(head));
    let pieces = pieces
        .zip(log_sums.par_chunks_mut(shape.length))
        .enumerate();
    let pieces = pieces.with_min_len(rows_a_piece(head));
    pieces.for_each_init(Vec::new, |scores, (place, ((q, out), log_sums))| {
        let served = place / shape.group() * head;
        let (k, v) = (&k[served..][..head], &v[served..][..head]);
        let first = shape.first(first, place / shape.heads);
        for block in blocks(first) {
            let keys = block.keys();
            block.scores(q, k, width, scores);
            for (i, row) in block.queries().zip(scores.chunks_exact_mut(keys)) {
                let row = block.seen(row, i, first);
                log_sums[i] = vectorised(
                    #[inline(always)]
                    || {
                        let most = largest(row);
                        let total = exponentials(row, most);
                        let factor = 1.0 / total;
                        for value in row.iter_mut() {
                            *value *= factor;
                        }
                        most + total.ln()
                    },
                );
            }
            let weights = Matrix::new(scores, block.count(), keys);
            let values = Matrix::new(block.of_keys(v, width), keys, width);
            let out = block.of_queries_mut(out, width);
            product(out, Into::Replace, weights, values, 1.0, Threads::One);
        }
    });
}

/// What [`attention`] read and wrote.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// Queries, `[R, H, L, E]`.
    pub q: &'a [f32],
    /// Keys, `[R, K, L, E]`.
    pub k: &'a [f32],
    /// Values, `[R, K, L, E]`.
    pub v: &'a [f32],
    /// The output with heads side by side, `[N, H E]`.
    pub merged: &'a [f32],
    /// Logarithms of the denominators, `[R, H, L]`.
    pub log_sums: &'a [f32],
}

/// The gradients by q, k and v, from the gradient by the output.
///
/// With `P` the weights and `D` the gradient by the output: `dV = Pᵀ D`,
/// `dS = P ∘ (D Vᵀ - Σ D ∘ out)`, `dQ = dS K`, `dK = dSᵀ Q`.
///
/// # Shapes
/// - gradient, dq: `[R, H, L, E]`
/// - dk, dv: `[R, K, L, E]`; zero before
pub fn attention_backward(
    shape: Shape,
    forward: Forward<'_>,
    gradient: &[f32],
    first: &[u32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let (head, width, group) = (shape.head(), shape.width, shape.group());
    assert!(gradient.len() == dq.len() && forward.q.len() == dq.len());
    assert!(forward.k.len() == dk.len() && dk.len() == dv.len() && dk.len() * group == dq.len());
    let pieces = dq.par_chunks_mut(group * head).zip(dk.par_chunks_mut(head));
    let pieces = pieces.zip(dv.par_chunks_mut(head)).enumerate();
    let pieces = pieces.with_min_len(rows_a_piece(group * head));
    let scratch = || (Vec::new(), Vec::new());
    pieces.for_each_init(scratch, |(weights, slopes), (served, ((dq, dk), dv))| {
        let (k, v) = (
            &forward.k[served * head..][..head],
            &forward.v[served * head..][..head],
        );
        let row = served / shape.kv_heads;
        let first = shape.first(first, row);
        for (g, dq) in dq.chunks_exact_mut(head).enumerate() {
            let place = served * group + g;
            let q = &forward.q[place * head..][..head];
            let d = &gradient[place * head..][..head];
            let log_sums = &forward.log_sums[place * shape.length..][..shape.length];
            let merged = |i: usize| {
                let token = row * shape.length + i;
                &forward.merged[(token * shape.heads + place % shape.heads) * width..][..width]
            };
            for block in blocks(first) {
                let (count, keys) = (block.count(), block.keys());
                block.scores(q, k, width, weights);
                block.scores(d, v, width, slopes);
                let rows = weights
                    .chunks_exact_mut(keys)
                    .zip(slopes.chunks_exact_mut(keys));
                for (i, (weights, slopes)) in block.queries().zip(rows) {
                    let d = &d[i * width..][..width];
                    let weights = block.seen(weights, i, first);
                    let slopes = block.seen(slopes, i, first);
                    let log_sum = log_sums[i];
                    vectorised(
                        #[inline(always)]
                        || {
                            let mean = sum2(d, merged(i), |a, b| a * b);
                            for (weight, slope) in weights.iter_mut().zip(slopes) {
                                *weight = exp(*weight - log_sum);
                                *slope = *weight * (*slope - mean);
                            }
                        },
                    );
                }
                let weights = Matrix::new(weights, count, keys);
                let slopes = Matrix::new(slopes, count, keys);
                let queries = Matrix::new(block.of_queries(q, width), count, width);
                let d = Matrix::new(block.of_queries(d, width), count, width);
                let k = Matrix::new(block.of_keys(k, width), keys, width);
                let (one, dq) = (Threads::One, block.of_queries_mut(dq, width));
                product(dq, Into::Replace, slopes, k, 1.0, one);
                let dk = block.of_keys_mut(dk, width);
                product(dk, Into::Add, slopes.transposed(), queries, 1.0, one);
                let dv = block.of_keys_mut(dv, width);
                product(dv, Into::Add, weights.transposed(), d, 1.0, one);
            }
        }
    });
}

/// Some queries, and the keys that any of them sees.
#[derive(Debug, Clone, Copy)]
struct Block {
    first_query: usize,
    end: usize,
    first_key: usize,
}

/// The queries of one row, some at a time.
fn blocks(first: &[u32]) -> impl Iterator<Item = Block> {
    (0..first.len()).step_by(QUERIES).map(|first_query| Block {
        first_query,
        end: (first_query + QUERIES).min(first.len()),
        first_key: first[first_query] as usize,
    })
}

impl Block {
    fn queries(self) -> std::ops::Range<usize> {
        self.first_query..self.end
    }

    fn count(self) -> usize {
        self.end - self.first_query
    }

    /// The last query sees itself and nothing later.
    fn keys(self) -> usize {
        self.end - self.first_key
    }

    fn of_queries(self, head: &[f32], width: usize) -> &[f32] {
        &head[self.first_query * width..self.end * width]
    }

    fn of_queries_mut(self, head: &mut [f32], width: usize) -> &mut [f32] {
        &mut head[self.first_query * width..self.end * width]
    }

    fn of_keys(self, head: &[f32], width: usize) -> &[f32] {
        &head[self.first_key * width..self.end * width]
    }

    fn of_keys_mut(self, head: &mut [f32], width: usize) -> &mut [f32] {
        &mut head[self.first_key * width..self.end * width]
    }

    /// `a bᵀ` for the block's queries and keys, `[queries, keys]`.
    fn scores(self, a: &[f32], b: &[f32], width: usize, out: &mut Vec<f32>) {
        let (count, keys) = (self.count(), self.keys());
        out.resize(count * keys, 0.0);
        let a = Matrix::new(self.of_queries(a, width), count, width);
        let b = Matrix::new(self.of_keys(b, width), keys, width);
        product(out, Into::Replace, a, b.transposed(), 1.0, Threads::One);
    }

    /// What a query sees in its row of scores; the rest becomes 0.
    fn seen<'r>(self, row: &'r mut [f32], query: usize, first: &[u32]) -> &'r mut [f32] {
        let (row, after) = row.split_at_mut(query + 1 - self.first_key);
        let (before, seen) = row.split_at_mut(first[query] as usize - self.first_key);
        before.fill(0.0);
        after.fill(0.0);
        seen
    }
}
