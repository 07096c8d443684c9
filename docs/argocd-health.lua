-- Argo CD: health of a TargetGroupBinding (argocd-cm, resource.customizations.health.elbv2.k8s.aws_TargetGroupBinding).
local health = { status = "Progressing", message = "not looked at yet" }
if obj.metadata.deletionTimestamp ~= nil then
  health.message = "being deleted"
end
if obj.status == nil or obj.status.conditions == nil then
  return health
end
if obj.status.observedGeneration ~= nil and obj.metadata.generation ~= nil
    and obj.status.observedGeneration < obj.metadata.generation then
  health.message = "a newer generation is not looked at yet"
  return health
end
local stalled = false
for _, condition in ipairs(obj.status.conditions) do
  if condition.type == "Stalled" and condition.status == "True" then
    stalled = true
  end
end
for _, condition in ipairs(obj.status.conditions) do
  if condition.type == "CleanupFailed" and condition.status == "True" then
    return { status = "Degraded", message = condition.message }
  end
  if condition.type == "Ready" then
    health.message = condition.reason .. ": " .. condition.message
    if condition.reason == "Paused" then
      health.status = "Suspended"
    elseif condition.status == "True" then
      health.status = "Healthy"
    elseif condition.status == "False" and stalled then
      health.status = "Degraded"
    end
  end
end
return health
