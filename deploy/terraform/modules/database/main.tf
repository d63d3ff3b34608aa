# A primary in two zones and its read replicas. An instance learns of replicas by their own addresses: the service itself
# chooses among them by how far each has replayed.

locals {
  engines = {
    postgres = { engine = "postgres", version = "18", family = "postgres18", port = 5432, scheme = "postgresql", logs = ["postgresql", "upgrade"] }
    mysql    = { engine = "mysql", version = "8.4", family = "mysql8.4", port = 3306, scheme = "mysql", logs = ["error", "slowquery"] }
  }
  chosen = local.engines[var.engine]
  # What the service relies on: the same limits as deploy/compose/postgres gives its role and servers.
  parameters = {
    postgres = {
      "rds.force_ssl" = "1"
      # What the Kubernetes overlay `production` needs at its maximum is 1,496; tests/deploy holds both to each other.
      "max_connections"                     = "1520"
      "hot_standby_feedback"                = "1"
      "statement_timeout"                   = "10000"
      "idle_in_transaction_session_timeout" = "15000"
      "log_min_duration_statement"          = "500"
      "log_statement"                       = "ddl"
    }
    mysql = {
      "require_secure_transport"        = "ON"
      "gtid-mode"                       = "ON"
      "enforce_gtid_consistency"        = "ON"
      "slow_query_log"                  = "1"
      "long_query_time"                 = "0.5"
      "innodb_flush_log_at_trx_commit"  = "1"
      "binlog_format"                   = "ROW"
      "transaction_isolation"           = "READ-COMMITTED"
      "innodb_lock_wait_timeout"        = "10"
      "replica_preserve_commit_order"   = "ON"
      "session_track_gtids"             = "OWN_GTID"
      "innodb_print_all_deadlocks"      = "ON"
      "log_bin_trust_function_creators" = "0"
      "performance_schema"              = "1"
      "max_connections"                 = "1520"
      "explicit_defaults_for_timestamp" = "1"
      "character_set_server"            = "utf8mb4"
      "collation_server"                = "utf8mb4_0900_bin"
    }
  }
}

resource "random_password" "owner" {
  length  = 40
  special = false
}

resource "aws_db_subnet_group" "this" {
  name       = var.name
  subnet_ids = var.subnet_ids
}

resource "aws_security_group" "this" {
  name        = "${var.name}-database"
  description = "Databases: from the machines of the service only"
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  security_group_id            = aws_security_group.this.id
  description                  = "Machines of the service"
  referenced_security_group_id = var.client_group
  from_port                    = local.chosen.port
  to_port                      = local.chosen.port
  ip_protocol                  = "tcp"
}

resource "aws_db_parameter_group" "this" {
  name   = "${var.name}-${var.engine}"
  family = local.chosen.family

  dynamic "parameter" {
    for_each = local.parameters[var.engine]

    content {
      name         = parameter.key
      value        = parameter.value
      apply_method = "pending-reboot"
    }
  }
}

resource "aws_db_instance" "primary" {
  # checkov:skip=CKV_AWS_161:the service signs in with a password from the secret; tokens of IAM live 15 minutes, a pool's connections longer
  identifier     = "${var.name}-primary"
  engine         = local.chosen.engine
  engine_version = local.chosen.version
  instance_class = var.instance_class

  db_name  = "scaleout"
  username = "scaleout"
  password = random_password.owner.result

  allocated_storage     = 100
  max_allocated_storage = 1000
  storage_type          = "gp3"
  storage_encrypted     = true
  kms_key_id            = var.key_arn

  multi_az               = true
  db_subnet_group_name   = aws_db_subnet_group.this.name
  vpc_security_group_ids = [aws_security_group.this.id]
  publicly_accessible    = false
  parameter_group_name   = aws_db_parameter_group.this.name

  backup_retention_period    = 14
  copy_tags_to_snapshot      = true
  delete_automated_backups   = false
  deletion_protection        = true
  skip_final_snapshot        = false
  final_snapshot_identifier  = "${var.name}-final"
  auto_minor_version_upgrade = true

  enabled_cloudwatch_logs_exports = local.chosen.logs
  performance_insights_enabled    = true
  performance_insights_kms_key_id = var.key_arn
  monitoring_interval             = 15
  monitoring_role_arn             = aws_iam_role.monitoring.arn
}

resource "aws_db_instance" "replica" {
  # checkov:skip=CKV_AWS_161:see primary
  # checkov:skip=CKV_AWS_157:a replica is not doubled: the service passes over one that is gone
  # checkov:skip=CKV_AWS_133:backups are taken of the primary
  # checkov:skip=CKV_AWS_293:a replica can be made anew from the primary
  count = var.replicas

  identifier          = "${var.name}-replica-${count.index + 1}"
  replicate_source_db = aws_db_instance.primary.identifier
  instance_class      = var.instance_class

  storage_encrypted          = true
  kms_key_id                 = var.key_arn
  vpc_security_group_ids     = [aws_security_group.this.id]
  publicly_accessible        = false
  parameter_group_name       = aws_db_parameter_group.this.name
  skip_final_snapshot        = true
  copy_tags_to_snapshot      = true
  auto_minor_version_upgrade = true

  enabled_cloudwatch_logs_exports = local.chosen.logs
  performance_insights_enabled    = true
  performance_insights_kms_key_id = var.key_arn
  monitoring_interval             = 15
  monitoring_role_arn             = aws_iam_role.monitoring.arn
}

resource "aws_iam_role" "monitoring" {
  name                = "${var.name}-database-monitoring"
  managed_policy_arns = ["arn:aws:iam::aws:policy/service-role/AmazonRDSEnhancedMonitoringRole"]
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "monitoring.rds.amazonaws.com" }
    }]
  })
}
