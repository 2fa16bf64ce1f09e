package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
)

// Dial connects to the socket of a hansed of the cluster, through the API server: it joins the two by `hansed connect` in a Pod that is ready. What is said of ctx holds until the
// connection is made; it lasts until it is closed.
func (c *Cluster) Dial(ctx context.Context) (net.Conn, error) {
	pod, err := c.readyPod(ctx)
	if err != nil {
		return nil, err
	}
	config := rest.CopyConfig(c.rest)
	config.GroupVersion, config.APIPath, config.NegotiatedSerializer = &corev1.SchemeGroupVersion, "/api", scheme.Codecs.WithoutConversion()
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, err
	}
	at := client.Post().Namespace(c.Namespace).Resource("pods").Name(pod).SubResource("exec").VersionedParams(&corev1.PodExecOptions{
		Container: hansed, Command: []string{"/hansed", "connect", "--config", "/etc/hanse/hansed.yaml"}, Stdin: true, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	exec, err := executor(config, at)
	if err != nil {
		return nil, err
	}
	lasting, cancel := context.WithCancel(context.WithoutCancel(ctx))
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	conn := &execConn{in: inW, out: outR, cancel: cancel, where: c.Namespace + "/" + pod}
	go func() {
		var said limited
		quiet := klog.NewContext(lasting, klog.Logger{}) // Close ends the stream in the middle, which is no fault to be logged
		err := exec.StreamWithContext(quiet, remotecommand.StreamOptions{Stdin: inR, Stdout: outW, Stderr: &said})
		if text := strings.TrimSpace(said.String()); err != nil && text != "" {
			err = fmt.Errorf("%s: %w", text, err)
		}
		if err == nil {
			err = io.EOF
		}
		_ = outW.CloseWithError(err)
		_ = inR.CloseWithError(err)
	}()
	return conn, nil
}

// executor speaks WebSocket, and SPDY where a proxy in between knows no better.
func executor(config *rest.Config, at *url.URL) (remotecommand.Executor, error) {
	ws, err := remotecommand.NewWebSocketExecutor(config, http.MethodGet, at.String())
	if err != nil {
		return nil, err
	}
	spdy, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, at)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewFallbackExecutor(ws, spdy, func(err error) bool { return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err) })
}

// readyPod is a Pod of hansed that can be asked.
func (c *Cluster) readyPod(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	pods, err := c.client.Resource(gvr("", "v1", "pods")).Namespace(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: nameLabel + "=" + hansed, Limit: 100})
	switch {
	case apierrors.IsForbidden(err):
		return "", &noPod{fmt.Errorf("pods of hansed in %s: %w", c.Namespace, err), "you need pods and pods/exec in " + c.Namespace + ": Role hanse-admin, which the chart's value admins gives"}
	case err != nil:
		return "", fmt.Errorf("pods of hansed in %s: %w", c.Namespace, err)
	case len(pods.Items) == 0:
		if _, err := c.client.Resource(kinds["StatefulSet"].GroupVersionResource).Namespace(c.Namespace).Get(ctx, hansed, metav1.GetOptions{}); err == nil {
			return "", &noPod{fmt.Errorf("context %s: hansed has no pod", c.Context), "kubectl --context " + c.Context + " -n " + c.Namespace + " describe statefulset " + hansed + " says why"}
		}
		return "", &noPod{fmt.Errorf("context %s, namespace %s: %w", c.Context, c.Namespace, ErrNotInstalled), "hanse install --context " + c.Context + "; or is it in another namespace?"}
	}
	for i := range pods.Items {
		if ready(&pods.Items[i]) {
			return pods.Items[i].GetName(), nil
		}
	}
	for i := range pods.Items { // one that runs can be asked why it is not ready
		if phase, _, _ := unstructured.NestedString(pods.Items[i].Object, "status", "phase"); phase == "Running" && pods.Items[i].GetDeletionTimestamp() == nil {
			return pods.Items[i].GetName(), nil
		}
	}
	return "", &noPod{fmt.Errorf("context %s: no pod of hansed runs: %s", c.Context, troubles(pods.Items)), "hanse check --context " + c.Context + "; kubectl --context " + c.Context + " -n " + c.Namespace + " describe pod " + hansed + "-0"}
}

// noPod is why there is nobody to ask, and what can be done.
type noPod struct {
	error
	hint string
}

func (e *noPod) Unwrap() error { return e.error }
func (e *noPod) Hint() string  { return e.hint }

// limited keeps the beginning of what is written.
type limited struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *limited) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if room := 4096 - l.buf.Len(); room > 0 {
		l.buf.Write(b[:min(room, len(b))])
	}
	return len(b), nil
}

func (l *limited) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// execConn is a stream of the API server as a net.Conn. It has no deadlines: whoever uses it bounds calls by closing it.
type execConn struct {
	in     *io.PipeWriter
	out    *io.PipeReader
	cancel context.CancelFunc
	where  string
}

func (c *execConn) Read(b []byte) (int, error)  { return c.out.Read(b) }
func (c *execConn) Write(b []byte) (int, error) { return c.in.Write(b) }

// Close ends both directions.
func (c *execConn) Close() error {
	err := errors.Join(c.in.Close(), c.out.Close())
	c.cancel()
	return err
}

func (c *execConn) LocalAddr() net.Addr              { return podAddr("hanse") }
func (c *execConn) RemoteAddr() net.Addr             { return podAddr(c.where) }
func (c *execConn) SetDeadline(time.Time) error      { return nil }
func (c *execConn) SetReadDeadline(time.Time) error  { return nil }
func (c *execConn) SetWriteDeadline(time.Time) error { return nil }

// podAddr names a Pod.
type podAddr string

func (podAddr) Network() string  { return "pod" }
func (a podAddr) String() string { return string(a) }
