package kube

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

const maxExposedPods = 500 // of one Service; more nodes than that are not told to anybody

// Exposed is by which host:port the port of that name of a Service (namespace/name) is reached from outside of the cluster, sorted: its load balancer's addresses and its external IPs; for
// a node port, or a host port of its Pods, the nodes on which its ready Pods are. It may be none, such as while a load balancer is being made; a Service that does not exist is none.
func (s *Source) Exposed(ctx context.Context, service, port string) ([]string, error) {
	namespace, name, _ := strings.Cut(service, "/")
	core := s.clients.typed[corev1.SchemeGroupVersion]
	var svc corev1.Service
	err := core.Get().Namespace(namespace).Resource("services").Name(name).Do(ctx).Into(&svc)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("service %s: %w", service, err)
	}
	i := slices.IndexFunc(svc.Spec.Ports, func(p corev1.ServicePort) bool { return p.Name == port })
	if i < 0 {
		return nil, fmt.Errorf("service %s has no port %q", service, port)
	}
	p := svc.Spec.Ports[i]
	var out []string
	add := func(host string, port int32) {
		if host != "" {
			out = append(out, net.JoinHostPort(host, strconv.Itoa(int(port))))
		}
	}
	for _, ip := range svc.Spec.ExternalIPs {
		add(ip, p.Port)
	}
	for _, l := range svc.Status.LoadBalancer.Ingress {
		add(cmp.Or(l.IP, l.Hostname), p.Port)
	}
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer && len(svc.Spec.Selector) > 0 {
		var pods corev1.PodList
		if err := core.Get().Namespace(namespace).Resource("pods").VersionedParams(&metav1.ListOptions{LabelSelector: labels.SelectorFromSet(svc.Spec.Selector).String(), Limit: maxExposedPods},
			s.clients.params).Do(ctx).Into(&pods); err != nil {
			return nil, fmt.Errorf("pods of service %s: %w", service, err)
		}
		for i := range pods.Items {
			pod := &pods.Items[i]
			host := hostPort(pod, p)
			if svc.Spec.Type == corev1.ServiceTypeNodePort {
				host = p.NodePort
			}
			if host == 0 || !podReady(pod) {
				continue
			}
			at, err := s.nodeAddress(ctx, pod)
			if err != nil {
				return nil, err
			}
			add(at, host)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// hostPort is the port of the Pod's node that leads to its target port, or 0.
func hostPort(pod *corev1.Pod, p corev1.ServicePort) int32 {
	for _, c := range pod.Spec.Containers {
		for _, port := range c.Ports {
			if port.HostPort != 0 && (port.Name != "" && port.Name == p.TargetPort.StrVal || port.ContainerPort == p.TargetPort.IntVal) {
				return port.HostPort
			}
		}
	}
	return 0
}

func podReady(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue })
}

// nodeAddress is how others than the cluster reach a Pod's node.
func (s *Source) nodeAddress(ctx context.Context, pod *corev1.Pod) (string, error) {
	var node corev1.Node
	if err := s.clients.typed[corev1.SchemeGroupVersion].Get().Resource("nodes").Name(pod.Spec.NodeName).Do(ctx).Into(&node); err != nil {
		return "", fmt.Errorf("node %s: %w", pod.Spec.NodeName, err)
	}
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeExternalIP {
			return a.Address, nil
		}
	}
	return pod.Status.HostIP, nil
}
