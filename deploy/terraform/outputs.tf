output "balancer" {
  description = "Where the DNS name of the service points."
  value       = module.api.balancer_dns
}

output "cdn" {
  description = "Where assets are served from."
  value       = module.storage.cdn_domain
}
