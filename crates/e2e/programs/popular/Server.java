import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;

/** Says how the machine looks to a JVM: most bytes of its heap, and its processors. */
public class Server {
    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(System.getenv("PORT"));
        HttpServer server = HttpServer.create(new InetSocketAddress(port), 0);
        server.createContext("/", exchange -> {
            Runtime runtime = Runtime.getRuntime();
            byte[] body = (runtime.maxMemory() + " " + runtime.availableProcessors() + "\n").getBytes();
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
    }
}
