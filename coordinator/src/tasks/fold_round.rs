//! stub
use super::Done;
use crate::app::App;
use crate::error::Error;
/// One.
///
/// # Errors
/// none
pub async fn run(_app: &App) -> Result<Done, Error> {
    Ok(Done::All)
}
