//! Reading a list to its end, page by page.

use anyhow::{Result, bail};

/// Most pages that are read; a coordinator that sends more is not well.
const PAGES_MAX: usize = 10_000;

/// Every item of a list. `fetch` gets a page token, at first an empty one, and gives the page's
/// items and the next token, empty on the last page.
pub async fn all<T, Answer>(fetch: impl Fn(String) -> Answer) -> Result<Vec<T>>
where
    Answer: Future<Output = Result<(Vec<T>, String)>>,
{
    let mut items = Vec::new();
    let mut page_token = String::new();
    for _ in 0..PAGES_MAX {
        let (page, next) = fetch(page_token).await?;
        items.extend(page);
        if next.is_empty() {
            return Ok(items);
        }
        page_token = next;
    }
    bail!("the list does not end: {PAGES_MAX} pages were read")
}
