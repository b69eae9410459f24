//! What an operator sees in `ps`.

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::parse::{self, Process};
use funtainer_e2e::world::scenario;

#[test]
fn every_process_says_what_it_is() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        server.deploy("with-arguments", &catalog::probe(&[], &[])?, &["--arg", "a b", "--arg", "c"])?;
        let mut all = Vec::new();
        for pid in world.members()? {
            all.extend(parse::process(pid)?);
        }
        let find = |title: &str, parent: i32| -> Result<&Process> {
            let found = all.iter().find(|process| process.title == title && process.parent == parent);
            found.with_context(|| format!("no child of {parent} is called '{title}' among {all:#?}"))
        };
        let keeper = all.iter().find(|process| process.pid == server.pid()).context("the keeper")?;
        ensure!(keeper.title.starts_with("funtainer serve"), "{keeper:?}");
        find("funtainer daemon", keeper.pid).or_else(|_| {
            let daemon =
                all.iter().find(|process| process.parent == keeper.pid && process.title.starts_with("funtainer daemon"));
            daemon.with_context(|| format!("no daemon among {all:#?}"))
        })?;
        find("funtainer net", keeper.pid)?;
        for (name, own) in [("hello", "/hello"), ("with-arguments", "/probe a b c")] {
            let zygote = find(&format!("funtainer zygote {name}"), keeper.pid)?;
            let init = find("funtainer init", zygote.pid)?;
            ensure!(server.init_pids(name)? == [init.pid], "describe names another process than {init:?}");
            find(own, init.pid)?;
        }
        ensure!(all.len() == 3 + 2 * 3, "more processes than that: {all:#?}");
        Ok(())
    })
}
