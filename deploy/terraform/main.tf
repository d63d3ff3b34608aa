# One region: a network in three zones, a load balancer before an Auto Scaling group of API machines, one of worker
# machines, PostgreSQL or MySQL with read replicas, Redis, object storage behind a CDN, secrets and alarms.

locals {
  name = "scaleout-${var.environment}"
}

module "network" {
  source = "./modules/network"

  name             = local.name
  zones            = var.zones
  prometheus_group = var.prometheus_group
}

module "database" {
  source = "./modules/database"

  name           = local.name
  engine         = var.engine
  instance_class = var.database_class
  replicas       = var.replicas
  vpc_id         = module.network.vpc_id
  subnet_ids     = module.network.data_subnet_ids
  client_group   = module.network.service_group_id
  key_arn        = aws_kms_key.data.arn
}

# Sessions, limits, locks and the broker. Nothing is evicted: a refused write is honest, a lost message is not.
module "redis" {
  source = "./modules/redis"

  name         = local.name
  eviction     = "noeviction"
  node_type    = var.cache_node
  vpc_id       = module.network.vpc_id
  subnet_ids   = module.network.data_subnet_ids
  client_group = module.network.service_group_id
  key_arn      = aws_kms_key.data.arn
}

# What can be loaded again. When it is full, what was used least goes.
module "cache" {
  source = "./modules/redis"

  name         = "${local.name}-cache"
  eviction     = "allkeys-lru"
  node_type    = var.cache_node
  vpc_id       = module.network.vpc_id
  subnet_ids   = module.network.data_subnet_ids
  client_group = module.network.service_group_id
  key_arn      = aws_kms_key.data.arn
}

module "storage" {
  source = "./modules/storage"

  name    = local.name
  key_arn = aws_kms_key.data.arn
  origin  = "https://${var.hostname}"
}

module "api" {
  source = "./modules/service"

  name              = "${local.name}-api"
  role              = "api"
  image             = var.image
  nginx_image       = var.nginx_image
  instance_type     = var.instance_type
  minimum           = 2
  maximum           = 10
  vpc_id            = module.network.vpc_id
  subnet_ids        = module.network.service_subnet_ids
  public_subnet_ids = module.network.public_subnet_ids
  service_group     = module.network.service_group_id
  balancer_group    = module.network.balancer_group_id
  certificate_arn   = var.certificate_arn
  log_bucket        = module.storage.log_bucket
  key_arn           = aws_kms_key.data.arn
  secret_arn        = aws_secretsmanager_secret.service.arn
  bucket_arn        = module.storage.bucket_arn
  settings          = local.settings
}

module "worker" {
  source = "./modules/service"

  name          = "${local.name}-worker"
  role          = "worker"
  image         = var.image
  instance_type = var.instance_type
  minimum       = 2
  maximum       = 10
  vpc_id        = module.network.vpc_id
  subnet_ids    = module.network.service_subnet_ids
  service_group = module.network.service_group_id
  key_arn       = aws_kms_key.data.arn
  secret_arn    = aws_secretsmanager_secret.service.arn
  bucket_arn    = module.storage.bucket_arn
  settings      = local.settings
}

module "alarms" {
  source = "./modules/alarms"

  name                = local.name
  email               = var.alarm_email
  key_arn             = aws_kms_key.data.arn
  balancer            = module.api.balancer_suffix
  target_group        = module.api.target_group_suffix
  database_ids        = module.database.ids
  replica_ids         = module.database.replica_ids
  redis_group         = module.redis.id
  api_group           = module.api.group_name
  scale_up_policy_arn = module.api.scale_up_policy_arn
}

locals {
  settings = {
    REGION             = var.region
    PUBLIC_URL         = "https://${var.hostname}"
    STORAGE_URL        = "s3://${module.storage.bucket}"
    STORAGE_PUBLIC_URL = "https://${module.storage.cdn_domain}"
    AWS_REGION         = var.region
    PAYMENT_URL        = var.payment_url
    TRUSTED_PROXIES    = module.network.cidr
    ADMIN_ALLOW        = join(",", concat(["127.0.0.0/8"], var.admin_networks))
    LOG_FORMAT         = "json"
    # Empty is as good as not there.
    OTEL_EXPORTER_OTLP_ENDPOINT = var.traces_endpoint
  }
}
