crate::support::tests! {}
