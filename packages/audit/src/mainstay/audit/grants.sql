-- Who may do what with the audit tables on PostgreSQL. Replace the three roles:
--   app_owner   owns the tables and runs `mainstay db upgrade`; no service logs in with it
--   app         the services: they may write entries and look at what waits for its seal
--   app_sealer  the one service that seals; only it has the signing key
-- Nobody may update, and only the sealer may delete, and only pending rows: no grant can say that they must be sealed
-- before, so a deletion by it is found by `mainstay audit verify`. What the sealer has refused, the owner removes. No table
-- refers to another, so nothing cascades. The leases are the database package's: every service that runs workers needs
-- them.
REVOKE ALL ON mainstay_audit_pending, mainstay_audit_log, mainstay_audit_nodes, mainstay_audit_checkpoints,
    mainstay_audit_refused FROM PUBLIC, app, app_sealer;

GRANT SELECT, INSERT ON mainstay_audit_pending TO app;
GRANT SELECT ON mainstay_audit_log, mainstay_audit_nodes, mainstay_audit_checkpoints, mainstay_audit_refused TO app;

GRANT SELECT, INSERT, DELETE ON mainstay_audit_pending TO app_sealer;
GRANT SELECT, INSERT ON mainstay_audit_log, mainstay_audit_nodes, mainstay_audit_checkpoints, mainstay_audit_refused
    TO app_sealer;

GRANT SELECT ON mainstay_audit_version, mainstay_database_version TO app, app_sealer;
GRANT SELECT, INSERT, UPDATE ON mainstay_database_leases TO app, app_sealer;
