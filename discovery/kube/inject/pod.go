package inject

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/hanse-mesh/hanse/discovery/kube"
)

// Names of what is added.
const (
	captureContainer = "hanse-capture"
	proxyContainer   = "hanse-proxy"

	volumeConfig = "hanse-config"
	volumeRoot   = "hanse-root"
	volumeToken  = "hanse-token"
	volumeState  = "hanse-state"
	volumeAPI    = "hanse-workload-api"
	volumePrefix = "hanse-"

	configDir  = "/etc/hanse/proxy"
	configFile = "hanse-proxy.yaml"
	rootDir    = "/etc/hanse/trust"
	tokenDir   = "/var/run/secrets/hanse"
	stateDir   = "/var/lib/hanse"
	apiDir     = "/run/hanse-workload-api"

	// user that the sidecar runs as, whose connections are not captured: nobody else's may be.
	user     = 1503
	waitUser = 65532 // of what waits to be captured

	hopPort    = 15008
	healthPort = 15021
)

// Pod puts a sidecar into a Pod, or the template of one, that Wanted says yes to. Where it fails, which it does with every fault of the Pod, the Pod is as before.
func (v *Values) Pod(meta *metav1.ObjectMeta, spec *corev1.PodSpec) error {
	var s settings
	faults := []error{s.parse(meta)}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		if c.Name == captureContainer || c.Name == proxyContainer {
			faults = append(faults, fmt.Errorf("container %s: the name belongs to the sidecar", c.Name))
		}
		if runsAs(c.SecurityContext, spec.SecurityContext) == user {
			faults = append(faults, fmt.Errorf("container %s: runAsUser: %d is the sidecar's user, whose connections are not captured", c.Name, user))
		}
		for _, p := range c.Ports {
			if p.Protocol != corev1.ProtocolUDP && (p.ContainerPort == hopPort || p.ContainerPort == healthPort) {
				faults = append(faults, fmt.Errorf("container %s: port %d belongs to the sidecar", c.Name, p.ContainerPort))
			}
		}
	}
	for _, vol := range spec.Volumes {
		if slices.Contains([]string{volumeConfig, volumeRoot, volumeToken, volumeState, volumeAPI}, vol.Name) {
			faults = append(faults, fmt.Errorf("volume %s: the name belongs to the sidecar", vol.Name))
		}
	}
	out := spec.DeepCopy()
	checks := rewriteProbes(out)
	rewriteHooks(out, checks)
	config, err := v.config(&s, checks)
	if err := errors.Join(append(faults, err)...); err != nil {
		return err
	}
	if s.workloadAPI {
		for i := range out.Containers {
			c := &out.Containers[i]
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: volumeAPI, MountPath: apiDir, ReadOnly: true})
			c.Env = append(c.Env, corev1.EnvVar{Name: "SPIFFE_ENDPOINT_SOCKET", Value: v.apiSocket()})
		}
	}
	out.InitContainers = slices.Concat([]corev1.Container{v.capture(&s), v.proxy(&s)}, out.InitContainers)
	out.Volumes = append(out.Volumes, v.volumes(&s)...)
	*spec = *out
	annotations := maps.Clone(meta.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[kube.SidecarAnnotation], annotations[annotationConfig] = v.Version, config
	meta.Annotations = annotations
	return nil
}

func runsAs(c *corev1.SecurityContext, p *corev1.PodSecurityContext) int64 {
	switch {
	case c != nil && c.RunAsUser != nil:
		return *c.RunAsUser
	case p != nil && p.RunAsUser != nil:
		return *p.RunAsUser
	}
	return -1
}

func (v *Values) image(s *settings) string {
	if s.image != "" {
		return s.image
	}
	return v.Image
}

// environment tells what is known only once the Pod runs.
func environment() []corev1.EnvVar {
	var out []corev1.EnvVar
	for _, e := range [][2]string{{"HANSE_POD_IP", "status.podIP"}, {"HANSE_POD_NAMESPACE", "metadata.namespace"}, {"HANSE_POD_NAME", "metadata.name"}, {"HANSE_HOST_IP", "status.hostIP"},
		{"HANSE_REGION", "metadata.labels['" + corev1.LabelTopologyRegion + "']"}, {"HANSE_ZONE", "metadata.labels['" + corev1.LabelTopologyZone + "']"}} {
		out = append(out, corev1.EnvVar{Name: e[0], ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: e[1]}}})
	}
	return out
}

// restricted is what the Pod Security Standard of that name asks for.
func restricted(uid int64) *corev1.SecurityContext {
	return &corev1.SecurityContext{
		RunAsUser: ptr(uid), RunAsGroup: ptr(uid), RunAsNonRoot: ptr(uid != 0), AllowPrivilegeEscalation: ptr(false), ReadOnlyRootFilesystem: ptr(true), Privileged: ptr(false),
		Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// capture installs the rules in the Pod's network, before anything else runs there, or waits until that has been done from the node.
func (v *Values) capture(s *settings) corev1.Container {
	c := corev1.Container{
		Name: captureContainer, Image: v.image(s), ImagePullPolicy: v.PullPolicy,
		Args: []string{"capture", "install", "--config", configDir + "/" + configFile}, Env: environment(),
		Resources:       corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("16Mi")}},
		SecurityContext: restricted(0),
		VolumeMounts:    []corev1.VolumeMount{{Name: volumeConfig, MountPath: configDir, ReadOnly: true}},
	}
	if v.Capture == CaptureOnNode {
		c.Args[1], c.SecurityContext = "wait", restricted(waitUser) // the kernel must not take it for the sidecar
		return c
	}
	c.SecurityContext.Capabilities.Add = []corev1.Capability{"NET_ADMIN"}
	return c
}

func (v *Values) proxy(s *settings) corev1.Container {
	resources := *v.Resources.DeepCopy()
	for name, q := range s.requests {
		if resources.Requests == nil {
			resources.Requests = corev1.ResourceList{}
		}
		resources.Requests[corev1.ResourceName(name)] = q
	}
	for name, q := range s.limits {
		if resources.Limits == nil {
			resources.Limits = corev1.ResourceList{}
		}
		resources.Limits[corev1.ResourceName(name)] = q
	}
	ready := corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/readyz", Port: intstr.FromInt32(healthPort), Scheme: corev1.URISchemeHTTP}}
	c := corev1.Container{
		Name: proxyContainer, Image: v.image(s), ImagePullPolicy: v.PullPolicy, RestartPolicy: ptr(corev1.ContainerRestartPolicyAlways),
		Args: []string{"--config", configDir + "/" + configFile}, Env: environment(), Resources: resources, SecurityContext: restricted(user),
		Ports: []corev1.ContainerPort{{Name: "hanse-hop", ContainerPort: hopPort, Protocol: corev1.ProtocolTCP}, {Name: "hanse-health", ContainerPort: healthPort, Protocol: corev1.ProtocolTCP}},
		// The application starts when this has succeeded. Two minutes are for a control plane that starts at the same time.
		StartupProbe:   &corev1.Probe{ProbeHandler: ready, PeriodSeconds: 1, TimeoutSeconds: 2, FailureThreshold: 120, SuccessThreshold: 1},
		ReadinessProbe: &corev1.Probe{ProbeHandler: ready, PeriodSeconds: 5, TimeoutSeconds: 2, FailureThreshold: 3, SuccessThreshold: 1},
		VolumeMounts:   []corev1.VolumeMount{{Name: volumeConfig, MountPath: configDir, ReadOnly: true}, {Name: volumeState, MountPath: stateDir}},
	}
	if !v.SPIRE.Used() {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: volumeRoot, MountPath: rootDir, ReadOnly: true}, corev1.VolumeMount{Name: volumeToken, MountPath: tokenDir, ReadOnly: true})
	}
	if v.SPIRE.Used() || s.workloadAPI {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: volumeAPI, MountPath: apiDir, ReadOnly: v.SPIRE.Used()})
	}
	return c
}

// apiSocket is where containers find the Workload API: the sidecar's or the SPIRE agent's.
func (v *Values) apiSocket() string {
	return "unix://" + apiDir + "/" + cmp.Or(v.SPIRE.Socket, "workload.sock")
}

func (v *Values) volumes(s *settings) []corev1.Volume {
	memory := func(name, limit string) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: ptr(resource.MustParse(limit))}}}
	}
	out := []corev1.Volume{
		{Name: volumeConfig, VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			{Path: configFile, FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.annotations['" + annotationConfig + "']"}}}}}},
		memory(volumeState, "32Mi"),
	}
	if v.SPIRE.Used() {
		return append(out, corev1.Volume{Name: volumeAPI, VolumeSource: v.SPIRE.volume()})
	}
	out = append(out,
		corev1.Volume{Name: volumeRoot, VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: RootConfigMap}}}},
		corev1.Volume{Name: volumeToken, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: v.Audience, ExpirationSeconds: ptr(int64(3600)), Path: "token"}}}}}})
	if s.workloadAPI {
		out = append(out, memory(volumeAPI, "1Mi"))
	}
	return out
}

// volume is the directory of the agent's socket. Of the node, it must be there: an empty one would only be waited at.
func (s SPIRE) volume() corev1.VolumeSource {
	if s.CSIDriver != "" {
		return corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: s.CSIDriver, ReadOnly: ptr(true)}}
	}
	return corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: s.HostPath, Type: ptr(corev1.HostPathDirectory)}}
}

func ptr[T any](v T) *T { return &v }
