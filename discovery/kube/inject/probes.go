package inject

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/hanse-mesh/hanse/proxy/probe"
)

// rewriteProbes leads what the kubelet would ask the application over the network to the sidecar, and returns what it is to be asked there. Commands
// stay, and so do probes that name a host: they go elsewhere.
func rewriteProbes(spec *corev1.PodSpec) map[string]probe.Check {
	checks := map[string]probe.Check{}
	for _, containers := range [][]corev1.Container{spec.Containers, spec.InitContainers} {
		for i := range containers {
			c := &containers[i]
			for kind, p := range map[string]*corev1.Probe{"liveness": c.LivenessProbe, "readiness": c.ReadinessProbe, "startup": c.StartupProbe} {
				if p == nil {
					continue
				}
				check, ok := checkOf(&p.ProbeHandler, c.Ports)
				if !ok {
					continue
				}
				path := "/check/" + c.Name + "/" + kind
				checks[path] = check
				p.ProbeHandler = corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(healthPort), Scheme: corev1.URISchemeHTTP}}
			}
		}
	}
	return checks
}

// rewriteHooks does the same with what the kubelet calls when a container has started and before it ends.
func rewriteHooks(spec *corev1.PodSpec, checks map[string]probe.Check) {
	for _, containers := range [][]corev1.Container{spec.Containers, spec.InitContainers} {
		for i := range containers {
			c := &containers[i]
			if c.Lifecycle == nil {
				continue
			}
			for kind, h := range map[string]*corev1.LifecycleHandler{"post-start": c.Lifecycle.PostStart, "pre-stop": c.Lifecycle.PreStop} {
				if h == nil || h.HTTPGet == nil {
					continue
				}
				check, ok := checkOf(&corev1.ProbeHandler{HTTPGet: h.HTTPGet}, c.Ports)
				if !ok {
					continue
				}
				check.Hook = true
				path := "/hook/" + c.Name + "/" + kind
				checks[path] = check
				h.HTTPGet = &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(healthPort), Scheme: corev1.URISchemeHTTP}
			}
		}
	}
}

func checkOf(h *corev1.ProbeHandler, ports []corev1.ContainerPort) (probe.Check, bool) {
	switch {
	case h.HTTPGet != nil && h.HTTPGet.Host == "":
		port, ok := portOf(h.HTTPGet.Port, ports)
		check := &probe.HTTP{Port: port, Path: h.HTTPGet.Path, HTTPS: h.HTTPGet.Scheme == corev1.URISchemeHTTPS}
		if !strings.HasPrefix(check.Path, "/") {
			check.Path = "/" + check.Path
		}
		for _, f := range h.HTTPGet.HTTPHeaders {
			check.Headers = append(check.Headers, [2]string{f.Name, f.Value})
		}
		return probe.Check{HTTP: check}, ok
	case h.TCPSocket != nil && h.TCPSocket.Host == "":
		port, ok := portOf(h.TCPSocket.Port, ports)
		return probe.Check{TCP: &probe.TCP{Port: port}}, ok
	case h.GRPC != nil:
		check := &probe.GRPC{Port: uint16(h.GRPC.Port)}
		if h.GRPC.Service != nil {
			check.Service = *h.GRPC.Service
		}
		return probe.Check{GRPC: check}, h.GRPC.Port > 0 && h.GRPC.Port < 1<<16
	}
	return probe.Check{}, false
}

func portOf(p intstr.IntOrString, ports []corev1.ContainerPort) (uint16, bool) {
	n := p.IntVal
	if p.Type == intstr.String {
		n = 0
		for _, c := range ports {
			if c.Name == p.StrVal {
				n = c.ContainerPort
			}
		}
	}
	return uint16(n), n > 0 && n < 1<<16
}
